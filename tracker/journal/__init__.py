"""Memory: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tracker.journal.entries import Entry, Journal, When
from tracker.journal.replay import become, fingerprint, lasting, twin_after

__all__ = [
    "Checkpoint",
    "Entry",
    "Journal",
    "When",
    "become",
    "fingerprint",
    "lasting",
    "read_checkpoint",
    "twin_after",
    "write_checkpoint",
]

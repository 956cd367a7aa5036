"""Memory: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.checkpoint import Checkpoint, read_checkpoint, read_text, write_checkpoint
from tracker.journal.entries import Entry, Journal, When
from tracker.journal.replay import become, fingerprint, fingerprint_of, lasting, twin_after

__all__ = [
    "Checkpoint",
    "Entry",
    "Journal",
    "When",
    "become",
    "fingerprint",
    "fingerprint_of",
    "lasting",
    "read_checkpoint",
    "read_text",
    "twin_after",
    "write_checkpoint",
]

"""Memory: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tracker.journal.entries import Entry, Journal

__all__ = ["Checkpoint", "Entry", "Journal", "read_checkpoint", "write_checkpoint"]

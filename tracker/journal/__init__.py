"""The journal: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.entries import Entry, Journal, When
from tracker.journal.replay import become, fingerprint, fingerprint_of, lasting, twin_after

__all__ = [
    "Entry",
    "Journal",
    "When",
    "become",
    "fingerprint",
    "fingerprint_of",
    "lasting",
    "twin_after",
]

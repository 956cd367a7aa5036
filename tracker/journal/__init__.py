"""The journal: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.entries import Entry, Journal, When
from tracker.journal.replay import (
    fingerprint,
    fingerprint_of,
    load_architecture,
    meta_model_after,
    persistent_tensors,
)

__all__ = [
    "Entry",
    "Journal",
    "When",
    "load_architecture",
    "fingerprint",
    "fingerprint_of",
    "persistent_tensors",
    "meta_model_after",
]

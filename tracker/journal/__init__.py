"""The journal: what was changed, in order, and how to do it again to freshly built model code."""

from tracker.journal.entries import Entry, Journal, When
from tracker.journal.origin import Origin
from tracker.journal.replay import (
    fingerprint,
    fingerprint_of,
    load_architecture,
    meta_model_after,
    moved_buffers,
    persistent_tensors,
    places,
)

__all__ = [
    "Entry",
    "Journal",
    "Origin",
    "When",
    "load_architecture",
    "fingerprint",
    "fingerprint_of",
    "persistent_tensors",
    "moved_buffers",
    "places",
    "meta_model_after",
]

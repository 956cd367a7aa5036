"""Rules: how each ATen operation relates the axes of its inputs to those of its result. One open registry."""

from tracker.structure.rules import indexing, math, shape  # noqa: F401  (they register themselves)
from tracker.structure.rules.registry import rule

__all__ = ["rule"]

"""Rules: how each ATen operation relates the axes of its inputs to those of its result. One open registry."""

from tracker.structure.rules import (  # noqa: F401  (they register themselves)
    indexing,
    math,
    shape,
    vision,
)
from tracker.structure.rules.registry import rule

__all__ = ["rule"]

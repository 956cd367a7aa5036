"""What to remove, and how the rest makes up for it: numbers in, numbers out."""

from tracker.compensation.allocate import Path, allocate
from tracker.compensation.criteria import CRITERIA, Evidence, criterion, lowest, scores
from tracker.compensation.select import (
    Selection,
    backward,
    explained_units,
    forward,
    path,
    select,
)
from tracker.compensation.slope import slope_along
from tracker.compensation.solve import Solution, compensate, explained_share, moments, residual

__all__ = [
    "CRITERIA",
    "Evidence",
    "Path",
    "Selection",
    "Solution",
    "allocate",
    "backward",
    "compensate",
    "criterion",
    "explained_share",
    "explained_units",
    "forward",
    "lowest",
    "moments",
    "path",
    "residual",
    "scores",
    "select",
    "slope_along",
]

"""What to remove, and how the rest makes up for it: numbers in, numbers out."""

from tracker.compensation.allocate import ErrorCurve, allocate
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
from tracker.compensation.solve import (
    Solution,
    column_growth,
    compensate,
    explained_share,
    residual,
)

__all__ = [
    "CRITERIA",
    "Evidence",
    "ErrorCurve",
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
    "column_growth",
    "path",
    "residual",
    "scores",
    "select",
    "slope_along",
]

"""Removal of units in place, as one transaction: plan (pure), apply (assigns only), verify, undo."""

from tracker.surgery.apply import UndoLog
from tracker.surgery.plan import units_of
from tracker.surgery.receipt import Receipt
from tracker.surgery.removal import remove_units

__all__ = ["Receipt", "UndoLog", "remove_units", "units_of"]

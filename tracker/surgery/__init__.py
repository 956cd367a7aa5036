"""Changes of a model in place, each as one transaction: plan (pure), apply (assigns only), verify, undo."""

from tracker.surgery.receipt import Receipt
from tracker.surgery.undo import UndoLog

__all__ = ["Receipt", "UndoLog"]

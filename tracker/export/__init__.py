"""Ways out: a changed model as other tools take it, each run and compared with the model in memory."""

from tracker.export.plain import to_plain

__all__ = ["to_plain"]

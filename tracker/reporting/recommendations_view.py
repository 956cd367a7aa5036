"""Recommendations as a dict that tells itself to people."""

from __future__ import annotations

from typing import Any

from tracker.reporting import text_reports
from tracker.utils.notebook import as_html


class Recommendations(dict[str, Any]):
    """The plain data of recommendations; `repr` and notebooks show the report."""

    def __repr__(self) -> str:
        try:
            return text_reports.optimization_report(self)
        except (KeyError, TypeError, IndexError, AttributeError):  # changed by hand
            return dict.__repr__(self)

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

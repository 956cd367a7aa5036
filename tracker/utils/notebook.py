"""What notebooks (Jupyter) show of results: pictures inline, reports once, texts as they are printed."""

from __future__ import annotations

import html
import io
import sys
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F")


def as_html(text: object) -> str:
    """A text for people, as a notebook shows it: in columns, and with a bar to scroll instead of broken lines."""
    return f'<pre style="white-space:pre;overflow-x:auto">{html.escape(str(text))}</pre>'


def inline(figure: F) -> F:
    """Have a notebook show a figure of matplotlib as a picture, without `%matplotlib inline`; the same figure."""
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def _cell() -> int | None:
    """Number of the cell that runs; None outside of notebooks."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return None if shell is None else int(shell.execution_count)


class PrintedText(str):
    """A text that was printed when it was made: the cell that made it does not show it again."""

    _cell: int | None

    def __new__(cls, text: str) -> PrintedText:
        """The text."""
        made = super().__new__(cls, text)
        made._cell = _cell()
        return made

    def _ipython_display_(self) -> None:
        if self._cell != _cell():
            print(self)


class PrintedList(list[Any]):
    """A list of which a table was printed when it was made.

    Args:
        items: Of the list.
        text: The table.
    """

    def __init__(self, items: Any = (), text: str = "") -> None:
        super().__init__(items)
        self._text, self._cell = text, _cell()

    def _ipython_display_(self) -> None:
        if self._cell != _cell():
            print(self._text or list(self))

"""A bar for each pass over data: on terminals and in notebooks, or where it is asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any


def bar(items: Iterable[Any], text: str, unit: str, progress: bool | None) -> Any:
    """The items, with a progress bar.

    Args:
        items: What is gone through.
        text: What is done, for people.
        unit: What one item is.
        progress: Whether there is a bar; None: only on a terminal and in a notebook.
    """
    if progress is None:
        progress = "ipykernel.zmqshell" in sys.modules or _is_terminal(sys.stderr)
    if not progress:
        return items
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widgets that are not installed: the plain bar serves
        from tqdm.auto import tqdm
    return tqdm(items, desc=text, unit=unit, leave=False)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())

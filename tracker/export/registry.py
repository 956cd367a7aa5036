"""An open registry of exporters: what `python -m tracker export --to NAME` finds."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from os import PathLike
from typing import Any

from tracker.engine import NeuronEngine
from tracker.errors import ExportError

GROUP = "tracker.exporters"  # of entry points


@dataclass(frozen=True, slots=True)
class Exporter:
    """One way out.

    Attributes:
        name: After `--to`.
        write: `write(engine, path)` writes the current model, and returns what is printed. It is also given those of
            the options `tokenizer` (a folder or None) and `dtype` that it names.
        ending: Of the path beside the checkpoint, where none is given.
    """

    name: str
    write: Callable[..., Any]
    ending: str = ""

    def __call__(self, engine: NeuronEngine, path: str | PathLike[str], **options: Any) -> Any:
        """Write the current model."""
        named = inspect.signature(self.write).parameters  # one that takes any is given none
        return self.write(engine, path, **{n: v for n, v in options.items() if n in named})


_EXPORTERS: dict[str, Exporter] = {}


def register_exporter(
    name: str, ending: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of (engine, path) as an exporter.

    Args:
        name: After `--to`.
        ending: Of the path beside the checkpoint, where none is given.

    Returns:
        A decorator; the function stays as it is.

    Examples:
        >>> from pathlib import Path
        >>> from tracker.export import register_exporter
        >>> @register_exporter("widths", ending=".txt")
        ... def widths(engine, path):
        ...     return Path(path).write_text(str(engine.get_summary()["layers"]))
    """

    def register(write: Callable[..., Any]) -> Callable[..., Any]:
        _EXPORTERS[name] = Exporter(name, write, ending)
        return write

    return register


def exporter_named(name: str) -> Exporter:
    """The exporter of a name.

    Args:
        name: One that was registered, one of an installed package (entry points of the group `tracker.exporters`), or
            "module:function", a function of (engine, path).

    Raises:
        ExportError: There is none.
    """
    if name in _EXPORTERS:
        return _EXPORTERS[name]
    module, _, function = name.partition(":")
    try:
        for point in entry_points(group=GROUP, name=name):
            return Exporter(name, point.load(), f".{name}")
        if function:
            if "" not in sys.path:
                sys.path.insert(0, "")
            return Exporter(
                name, getattr(importlib.import_module(module), function), f".{function}"
            )
    except Exception as error:
        raise ExportError(f"The exporter {name!r} cannot be loaded: {error}") from error
    raise ExportError(
        f"There is no exporter {name!r}, but {', '.join(sorted(_EXPORTERS))}. Others are given as module:function."
    )

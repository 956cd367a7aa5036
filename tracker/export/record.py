"""What was written, how it was checked, and the packages that writing needs."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tracker.errors import ExportError
from tracker.utils.files import exchange

# Endings of the files in a directory that transformers reads.
EXPORTED = (".json", ".safetensors", ".txt", ".model", ".py", ".jinja", ".md")


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: The file or directory.
        kind: "onnx", "hugging face" or "gguf".
        bytes: Size of all that was written.
        output_difference: Largest difference of outputs, relative to the largest one, between what was written, run by
            `checked_with`, and the model in memory; None if it was not checked.
        checked_with: What ran it, "" if nothing did.
        notes: What is to be known beside.

    Examples:
        >>> from tracker.export import to_onnx
        >>> report = to_onnx(engine, "small.onnx")  # doctest: +SKIP
        >>> report.checked_with, report.output_difference < 1e-5  # doctest: +SKIP
        ('onnxruntime', True)
    """

    path: Path
    kind: str
    bytes: int
    output_difference: float | None = None
    checked_with: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = "not checked"
        if self.output_difference is not None:
            checked = (
                f"outputs differ by {self.output_difference:.1e}, checked with {self.checked_with}"
            )
        lines = [f"{self.path} ({self.kind}, {self.bytes / 1e6:,.1f} MB): {checked}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def needed(package: str, extra: str) -> Any:
    """The package, imported.

    Raises:
        ExportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"This export needs the package {package!r}, which cannot be imported ({error}). "
            f"Install what it needs: pip install 'self-modifying-slm[{extra}]'."
        ) from error


@contextmanager
def whole_or_nothing(path: str | PathLike[str], kind: str = "file") -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end; on any error nothing is left of it.

    Args:
        path: The goal. A file or an earlier export that is there is replaced.
        kind: "file" or "directory".

    Raises:
        ExportError: There is something else at `path`.
    """
    goal = Path(path).absolute()
    _require_free(goal, kind)
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=goal.parent, prefix=f".{goal.name[:100]}.") as beside:
        made = Path(beside) / goal.name
        yield made
        _require_free(goal, kind)
        if kind == "file" or not goal.exists():
            made.replace(goal)
        elif not exchange(made, goal):
            old = Path(beside) / "old"
            goal.rename(old)
            made.rename(goal)


def _require_free(goal: Path, kind: str) -> None:
    if not goal.exists():
        return
    if goal.is_dir() != (kind == "directory"):
        there = "directory" if goal.is_dir() else "file"
        raise ExportError(
            f"A {kind} is to be written to {goal}, where a {there} is. Choose another path."
        )
    if kind == "directory":
        others = [f.name for f in goal.iterdir() if f.is_dir() or f.suffix not in EXPORTED]
        if others or (any(goal.iterdir()) and not (goal / "config.json").is_file()):
            raise ExportError(
                f"The directory {goal} is no earlier export: it holds {(others or ['files without config.json'])[0]}. "
                "Choose another path, or empty it."
            )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())

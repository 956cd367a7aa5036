"""What was written, how it was checked, and the packages that writing needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracker.errors import ExportError


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


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())

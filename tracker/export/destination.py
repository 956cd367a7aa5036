"""Where an export is written: whole or not at all, and never over what is not an export of ours."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from tracker.errors import ExportError, TrackerError
from tracker.utils.files import exchange, flush

MARK = "tracker_export.json"  # in a directory that was exported: the names of all its files
FORMAT, VERSION = "tracker export", 1
LARGEST = 1 << 20  # bytes of a mark that is read


@contextmanager
def whole_or_nothing(path: str | PathLike[str], kind: str = "file") -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end; on any error nothing is left of it.

    Args:
        path: The goal. A file that is there is replaced (a link stays, and what it leads to is replaced), and so is a
            directory that holds exactly the files of an earlier export, by the list in its `tracker_export.json`.
        kind: "file" or "directory".

    Raises:
        ExportError: Something else is at `path`, or it cannot be written; what was there is as it was.
    """
    try:
        goal = Path(os.path.realpath(path))
        _require_free(goal, kind)
        goal.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=goal.parent, prefix=f".{goal.name[:100]}.") as beside:
            made = Path(beside) / goal.name
            yield made
            if kind == "directory":
                _mark(made)
            elif goal.exists():  # a private file stays private
                made.chmod(stat.S_IMODE(goal.stat().st_mode))
            for file in sorted(made.rglob("*")) if kind == "directory" else [made]:
                flush(file)
            _require_free(goal, kind)
            if kind == "file" or not goal.exists():
                made.replace(goal)
            elif not exchange(made, goal):
                old = Path(beside) / "old"
                goal.rename(old)
                made.rename(goal)
    except TrackerError:
        raise
    except Exception as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ExportError(
            f"{os.fspath(path)!r} cannot be written: {why or type(error).__name__}. What was there is as it was: "
            "choose another path, or make room."
        ) from error


def _require_free(goal: Path, kind: str) -> None:
    """Refuse a path where something is that is not to be replaced."""
    if not goal.exists():
        return
    if kind == "file":
        if not goal.is_file():
            there = "directory" if goal.is_dir() else "pipe or device"
            raise ExportError(
                f"A file is to be written to {goal}, where a {there} is. Choose another path."
            )
        return
    if not goal.is_dir():
        raise ExportError(
            f"A directory is to be written to {goal}, where a file is. Choose another path."
        )
    files, marked = _listed(goal)
    if files and files != marked:
        raise ExportError(
            f"The directory {goal} is no earlier export: it has no {MARK} that lists exactly the files in it "
            f"({files[0]!r} for one). Choose another path, or empty it."
        )


def _listed(goal: Path) -> tuple[list[str], list[str] | None]:
    """The files in a directory, and those that its mark lists, both of the same directory."""
    while True:  # another export may take its place meanwhile
        before = goal.stat().st_ino
        files, marked = _files(goal), _marked(goal)
        if files == marked or goal.stat().st_ino == before:
            return files, marked


def _files(folder: Path) -> list[str]:
    """All that lies in a directory but for the mark; of directories inside, their names too."""
    return sorted(
        found.relative_to(folder).as_posix() + ("/" if found.is_dir() else "")
        for found in folder.rglob("*")
        if found != folder / MARK
    )


def _mark(folder: Path) -> None:
    table = {"format": FORMAT, "version": VERSION, "files": _files(folder)}
    (folder / MARK).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _marked(folder: Path) -> list[str] | None:
    """The files that an earlier export wrote here; None where there was none."""
    mark = folder / MARK
    try:
        if mark.is_symlink() or not mark.is_file() or mark.stat().st_size > LARGEST:
            return None
        table = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(table, dict) or (table.get("format"), table.get("version")) != (
        FORMAT,
        VERSION,
    ):
        return None
    files = table.get("files")
    return files if isinstance(files, list) else None

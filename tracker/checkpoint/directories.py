"""Where checkpoints stand: which directories are ours, one writer at a time, and whole ones given their names.

A checkpoint is written as a draft beside its place, and takes the place in one step. Nothing is removed that does not
carry our own mark, and of what does only the files that the mark speaks of.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracker.errors import CheckpointError
from tracker.utils.files import exchange, flush, locked, machine, unique

FORMAT, VERSION = "tracker-checkpoint", 1
TENSORS = ("model", "optimizer", "statistics", "random")
TEXTS = ("journal", "engine")
FILES = (*(f"{t}.safetensors" for t in TENSORS), *(f"{t}.json" for t in TEXTS))
MANIFEST, DRAFT = "manifest.json", "draft.json"
LARGEST = 2**20  # bytes of a manifest
PATIENCE, HURRIED = (
    600.0,
    60.0,
)  # seconds to wait for another writer; in a handler that interrupts one who waits
DAY = 86400.0  # seconds after which what another machine left behind is dead
TRIES = 100
LOOKS = 5  # before what seems to be something else is believed to be


@dataclass(slots=True, eq=False)
class Turn:
    """A save under way.

    alone: All other writers are kept out. superseded: A later save is in place already, of a handler that interrupted
    this one.
    """

    alone: bool = False
    superseded: bool = False


class _Saves(threading.local):
    """Of this thread, by place: a handler of a signal may save while it does."""

    def __init__(self) -> None:
        self.open: dict[Path, list[Turn]] = {}


_saves = _Saves()


@contextlib.contextmanager
def turn(target: Path) -> Iterator[Turn]:
    """One writer of a place at a time, where the file system has locks.

    A save that interrupts one of the same thread, which holds the lock, does not wait for it.

    Raises:
        OSError: Another writer does not finish, or no lock can be made.
    """
    place = Path(os.path.realpath(target.parent)) / target.name
    outer = _saves.open.setdefault(place, [])
    own = Turn()
    outer.append(own)
    try:
        if any(each.alone for each in outer):
            yield own
        else:
            patience = PATIENCE if outer == [own] else HURRIED
            with locked(target.with_name(f".{target.name}.lock"), patience) as own.alone:
                yield own
                own.alone = False
    finally:
        outer.remove(own)
        if not outer:
            _saves.open.pop(place, None)


def place(draft: Path, target: Path) -> None:
    """Give a whole checkpoint its name, and remove the one that had it. At every instant the old or the new one loads.

    Raises:
        CheckpointError: What is there is not ours; it is as it was.
        OSError: It cannot be done; what was there is as it was.
    """
    for _ in range(TRIES):
        try:
            if _placed(draft, target):
                break
        except FileNotFoundError:  # where there are no locks: another writer was first
            if not draft.exists():
                raise
    else:
        raise TimeoutError(errno.ETIMEDOUT, "other writers are always first", str(target))
    for turn in _saves.open.get(Path(os.path.realpath(target.parent)) / target.name, ())[:-1]:
        turn.superseded = True


def _placed(draft: Path, target: Path) -> bool:
    if is_usable_target(target):
        try:
            if os.name == "nt" and target.exists():
                target.rmdir()
            os.rename(draft, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        flush(target.parent)
        return True
    require_ours(target)
    if exchange(draft, target):
        if not is_ours(draft):  # it came between
            exchange(draft, target)
            require_ours(target)
            return False
        flush(target.parent)
        discard(draft)
        return True
    aside = beside(target, "old")
    os.rename(target, aside)
    try:
        if is_ours(aside):
            os.rename(draft, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        if not os.path.lexists(target):
            os.rename(aside, target)
    if draft.exists():
        if os.path.lexists(target) and is_ours(aside):  # another writer's is there, and later
            discard(aside)
        return False
    flush(target.parent)
    discard(aside)
    return True


def begin(target: Path) -> Path:
    """An empty draft beside a place, with our mark."""
    draft = beside(target, "new")
    draft.mkdir()
    mark = json.dumps({"format": FORMAT, "draft": True}).encode()
    handle = os.open(draft / DRAFT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(handle, mark)
    finally:
        os.close(handle)
    return draft


def finish(draft: Path) -> None:
    """A draft that is whole and on the disk becomes a checkpoint."""
    for name in (*FILES, MANIFEST):
        flush(draft / name)
    (draft / DRAFT).unlink()
    flush(draft)


def discard(folder: Path) -> None:
    """Remove a draft or a checkpoint of ours: the files that its mark speaks of, and the folder if that was all."""
    with contextlib.suppress(OSError):
        names = set(os.listdir(folder))
        # A draft of which nothing was written, not even its mark.
        blank = names == {DRAFT} and not (folder / DRAFT).lstat().st_size
        if names and not (blank or _is_draft(folder) or _manifest(folder) is not None):
            return
        # The marks last: whoever interrupts this leaves something that the next one still knows.
        for name in (*FILES, *([MANIFEST, DRAFT] if DRAFT in names else [MANIFEST])):
            if name in names:
                (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def sweep(target: Path) -> None:
    """Remove what writers left behind that are surely dead: of this machine, as all others are kept out; or old."""
    there = is_ours(target)
    with contextlib.suppress(OSError):
        for folder in [*target.parent.iterdir()]:
            maker = _maker(folder, target)
            if maker is None or not (there or _is_draft(folder)):
                continue
            if maker in ("", machine()) or _age(folder, target.parent) > DAY:
                discard(folder)


def last_aside(target: Path) -> Path | None:
    """The checkpoint that was moved aside while its successor took its place, if that was interrupted."""
    old, found = f".{target.name}.old", list[tuple[float, Path]]()
    with contextlib.suppress(OSError):
        for folder in target.parent.iterdir():
            own = folder.name == old or folder.name.startswith(f"{old}-")
            if own and is_ours(folder):
                found.append(((folder / MANIFEST).stat().st_mtime, folder))
    return max(found)[1] if found else None


def require_ours(target: Path) -> None:
    """A checkpoint or an empty directory may be replaced, nothing else.

    Raises:
        CheckpointError: It is something else.
    """
    for _ in range(LOOKS):
        with contextlib.suppress(FileNotFoundError):
            if is_usable_target(target) or is_ours(target):
                return
        time.sleep(0.002)  # where there are no locks, another writer may have moved it meanwhile
    raise CheckpointError(
        f"{target} exists and is no checkpoint, or holds more or other files than its {MANIFEST} lists: it is not "
        "overwritten. Save to another path, or move it away."
    )


def is_usable_target(target: Path) -> bool:
    """Whether there is nothing, or an empty directory."""
    if target.is_symlink():
        return False
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def is_ours(folder: Path) -> bool:
    """Whether a directory is a checkpoint by its manifest's content, and holds exactly what that lists."""
    try:
        facts = folder.lstat()
        manifest = _manifest(folder) if stat.S_ISDIR(facts.st_mode) else None
        names = set(os.listdir(folder)) if manifest is not None else set()
        regular = all(stat.S_ISREG((folder / name).lstat().st_mode) for name in names)
    except OSError:
        return False
    return manifest is not None and regular and names == {MANIFEST, *manifest["files"]}


def beside(target: Path, kind: str) -> Path:
    """A name beside a place that nobody else has."""
    return target.with_name(f".{target.name}.{kind}-{unique()}")


def _manifest(folder: Path) -> dict[str, Any] | None:
    found = _json(folder / MANIFEST)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        return None
    files = found.get("files")
    return found if isinstance(files, dict) and set(files) == set(FILES) else None


def _is_draft(folder: Path) -> bool:
    found = _json(folder / DRAFT)
    return found.get("format") == FORMAT and found.get("draft") is True


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGEST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _maker(folder: Path, target: Path) -> str | None:
    """The machine that a draft was made on; "" for a checkpoint that the first format moved aside; None: neither."""
    old = f".{target.name}.old"
    if folder.name == old:
        return ""
    for start in (f".{target.name}.new-", f"{old}-"):
        rest = folder.name.removeprefix(start).split("-")
        if folder.name.startswith(start) and len(rest) == 2:
            return rest[0]
    return None


def _age(folder: Path, parent: Path) -> float:
    """Seconds since anything in it was written, by the clock of the file system."""
    with tempfile.TemporaryFile(dir=parent) as probe:  # has no name to be left behind
        now = os.fstat(probe.fileno()).st_mtime
    return now - max(p.lstat().st_mtime for p in (folder, *folder.iterdir()))

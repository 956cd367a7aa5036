"""A checkpoint is a directory of safetensors and JSON files, and a manifest with their sizes and hashes.

Its files never change once it has its name: another checkpoint takes the place of the whole directory. Reading it runs
no code from it, and nothing is believed before it is checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from tracker.checkpoint import directories
from tracker.checkpoint.directories import FILES, FORMAT, MANIFEST, TENSORS, TEXTS, VERSION
from tracker.errors import CheckpointError
from tracker.journal.entries import MOST
from tracker.utils.files import OpenFile
from tracker.utils.safetensors_tables import bytes_of, table_of

LARGEST = {MANIFEST: directories.LARGEST, "journal.json": 2**28, "engine.json": 2**29}  # bytes
AGAIN = 50  # times that a reader begins again when the checkpoint was replaced meanwhile
UNREADABLE = (OSError, ValueError, RuntimeError, MemoryError)
GONE = (errno.ENOENT, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: tables of tensors and plain data, by the names of their files."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, Any]


def write_checkpoint(path: str | os.PathLike[str], content: Checkpoint) -> Path:
    """Write a checkpoint; one that is there already is replaced at the end.

    Raises:
        CheckpointError: It cannot be written, or `path` is something else than a checkpoint.
    """
    try:
        target = Path(os.path.abspath(path))
        directories.require_ours(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with directories.turn(target) as turn:
            if turn.alone:
                directories.sweep(target)
            draft = directories.begin(target)
            try:
                _write(draft, content)
                directories.finish(draft)
                if not turn.superseded:
                    directories.place(draft, target)
            finally:
                directories.discard(draft)
            if turn.alone:
                directories.sweep(target)
    except (OSError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"No checkpoint can be written to {path!r}: {error}") from error
    return Path(path)


def _write(folder: Path, content: Checkpoint) -> None:
    files = {}
    for name in TENSORS:
        file = f"{name}.safetensors"
        files[file] = _put(folder / file, bytes_of(content.tensors[name]))
    for name in TEXTS:
        text, file = json.dumps(content.texts[name]).encode(), f"{name}.json"
        if len(text) > LARGEST[file]:
            raise ValueError(f"{file} would be larger than {LARGEST[file]} bytes")
        files[file] = _put(folder / file, [text])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "libraries": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        "files": files,
    }
    _put(folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])


def _put(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file that is not there yet; its size and hash."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What a checkpoint holds, once its manifest, sizes and hashes are found right.

    Each file is opened once, and read and hashed through that one descriptor. Of a checkpoint that is replaced
    meanwhile, all is of the old one or all of the new one.

    Raises:
        CheckpointError: There is none, or it is damaged, foreign, or of a newer version.
    """
    try:
        target = Path(os.path.abspath(path))
        for attempt in range(AGAIN):
            # Its successor may not have been put in its place.
            folder = target if target.exists() else directories.last_aside(target) or target
            try:
                with _opened(folder) as files:
                    return _read(files, folder)
            except OSError as error:
                # A writer removes the old one once the new one is in place.
                if error.errno not in GONE or attempt == AGAIN - 1 or not _moves(target, folder):
                    raise
    except UNREADABLE as error:
        raise CheckpointError(f"No checkpoint can be read from {path!r}: {error}") from error
    raise AssertionError


def _moves(target: Path, folder: Path) -> bool:
    """Whether a file may be missing because a writer is replacing the checkpoint, rather than for good."""
    if folder != target:
        return True
    for _ in range(directories.LOOKS):
        time.sleep(0.002)
        if directories.is_ours(target) or not target.exists():
            return True
    return False


def _read(files: _Files, folder: Path) -> Checkpoint:
    manifest = _parsed(files.whole(MANIFEST), MANIFEST)
    _check_manifest(manifest, folder)
    handles = {name: files.open(name) for name in FILES}  # before any is read: it may be replaced
    found = {}
    for name, facts in manifest["files"].items():
        size = handles[name].size
        if (
            not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or facts["bytes"] != size
        ):
            raise CheckpointError(f"{name} has {size} bytes, and not what its manifest says.")
        data = handles[name].read()
        if facts.get("sha256") != hashlib.sha256(data).hexdigest():
            raise CheckpointError(f"{name} is damaged: its hash is not the one in its manifest.")
        found[name] = data
    # Before they are parsed, which takes longer than to count them.
    if found["journal.json"].count(b'"operation"') > MOST:
        raise ValueError(f"a journal of more than {MOST:,} entries is not believed")
    tensors = {name: table_of(found[f"{name}.safetensors"]) for name in TENSORS}
    texts = {name: _parsed(found[f"{name}.json"], f"{name}.json") for name in TEXTS}
    return Checkpoint(tensors, texts)


def read_text(path: str | os.PathLike[str]) -> Any:
    """The plain data of one JSON file of a checkpoint, or of a journal.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        source = Path(os.path.abspath(path))
        with _opened(source.parent) as files:
            return _parsed(files.whole(source.name, LARGEST["engine.json"]), source.name)
    except UNREADABLE as error:
        raise CheckpointError(f"{path!r} cannot be read: {error}") from error


def _check_manifest(manifest: Any, folder: Path) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} holds no checkpoint of this library.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} is a checkpoint of version {manifest.get('version')!r}; this library reads {VERSION}."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise CheckpointError(f"{folder} names other files than a checkpoint has.")


class _Files:
    """Files of one directory, which stays the same one, whatever takes its name."""

    def __init__(self, folder: Path, close: contextlib.ExitStack) -> None:
        self._folder, self._close, self._at = folder, close, None
        if os.open in os.supports_dir_fd:
            self._at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            close.callback(os.close, self._at)

    def open(self, name: str) -> OpenFile:
        """A file of this name; no link, and no pipe that nobody writes to is waited for."""
        flags = os.O_RDONLY
        for more in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
            flags |= getattr(os, more, 0)
        where = self._folder / name if self._at is None else name
        descriptor = os.open(where, flags, dir_fd=self._at)
        self._close.callback(os.close, descriptor)
        return OpenFile(descriptor, name)

    def whole(self, name: str, largest: int = LARGEST[MANIFEST]) -> bytearray:
        """All of a file that is not too large."""
        return self.open(name).read(largest)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[_Files]:
    with contextlib.ExitStack() as close:
        yield _Files(folder, close)


def _parsed(data: bytearray, name: str) -> Any:
    if len(data) > LARGEST.get(name, LARGEST["engine.json"]):
        raise ValueError(f"{name} is larger than {LARGEST[name]} bytes")
    return json.loads(data.decode("utf-8"))

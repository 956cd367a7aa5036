"""A checkpoint is a directory of safetensors and JSON files, and a manifest with their sizes and hashes.

It is written beside its place and then renamed, so that there is always an old or a new one that loads. Reading it runs
no code from it, and nothing is believed before it is checked.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tracker.errors import CheckpointError

FORMAT, VERSION = "tracker-checkpoint", 1
TENSORS = ("model", "optimizer", "statistics", "random")
TEXTS = ("journal", "engine")
FILES = (*(f"{t}.safetensors" for t in TENSORS), *(f"{t}.json" for t in TEXTS))
MANIFEST = "manifest.json"
LARGEST = {MANIFEST: 2**20, "journal.json": 2**28, "engine.json": 2**29}  # bytes


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
    target = Path(os.path.abspath(path))
    _require_ours(target)
    new, old = target.with_name(f".{target.name}.new-{os.getpid()}"), _old(target)
    try:
        _sweep(target)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _write(new, content)
        _require_ours(target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError | ValueError):
            raise CheckpointError(f"No checkpoint can be written to {path}: {error}") from error
        raise
    return Path(path)


def _write(folder: Path, content: Checkpoint) -> None:
    for name in TENSORS:
        table = {k: v.detach().cpu().contiguous() for k, v in content.tensors[name].items()}
        save_file(table, str(folder / f"{name}.safetensors"))
    for name in TEXTS:
        (folder / f"{name}.json").write_text(json.dumps(content.texts[name]), encoding="utf-8")
    files = {f: {"bytes": (folder / f).stat().st_size, "sha256": _hash(folder / f)} for f in FILES}
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
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in (*FILES, MANIFEST):
        _flush(folder / file)
    _flush(folder)


def _require_ours(target: Path) -> None:
    """A checkpoint or an empty directory may be replaced, nothing else."""
    if not target.exists() and not target.is_symlink():
        return
    ours = target.is_dir() and not target.is_symlink()
    if not ours or not ((target / MANIFEST).is_file() or not any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is no checkpoint: it is not overwritten.")


def _sweep(target: Path) -> None:
    """Remove what writers that were killed left behind."""
    for draft in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        number = draft.name.rpartition("-")[2]
        if number.isdigit() and not _lives(int(number)):
            shutil.rmtree(draft, ignore_errors=True)


def _lives(process: int) -> bool:
    if os.name != "posix":
        return True  # there the signal 0 is a real one
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What a checkpoint holds, once its manifest, sizes and hashes are found right.

    Raises:
        CheckpointError: There is none, or it is damaged, foreign, or of a newer version.
    """
    target = Path(os.path.abspath(path))
    if not target.exists() and _old(target).exists():
        target = _old(target)  # its successor was not finished
    try:
        manifest = _json(target / MANIFEST, LARGEST[MANIFEST])
        _check_manifest(manifest, target)
        tensors = {name: load_file(str(target / f"{name}.safetensors")) for name in TENSORS}
        texts = {name: _json(target / (f := f"{name}.json"), LARGEST[f]) for name in TEXTS}
    except (OSError, SafetensorError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"No checkpoint can be read from {path}: {error}") from error
    return Checkpoint(tensors, texts)


def read_text(path: str | os.PathLike[str]) -> Any:
    """The plain data of one JSON file of a checkpoint, or of a journal.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return _json(Path(path), LARGEST["engine.json"])
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


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
    for name, facts in files.items():
        file = folder / name
        size = _size(file)
        if (
            not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or facts["bytes"] != size
        ):
            raise CheckpointError(f"{name} has {size} bytes, and not what its manifest says.")
        if facts.get("sha256") != _hash(file):
            raise CheckpointError(f"{name} is damaged: its hash is not the one in its manifest.")


def _json(path: Path, largest: int) -> Any:
    if _size(path) > largest:
        raise ValueError(f"{path.name} is larger than {largest} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _size(path: Path) -> int:
    """Bytes of an ordinary file: a pipe or a device would never end."""
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path.name} is no ordinary file")
    return facts.st_size


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")

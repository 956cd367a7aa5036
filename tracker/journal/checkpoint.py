"""A checkpoint is a directory of safetensors and JSON files, and a manifest with their sizes and hashes.

It is written beside its place and then renamed, so that there is always an old or a new one that loads. Reading it runs
no code from it, and nothing is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LARGEST_TEXT = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: tables of tensors and plain data, by the names of their files."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, Any]


def write_checkpoint(path: str | os.PathLike[str], content: Checkpoint) -> Path:
    """Write a checkpoint; one that is there already is replaced at the end."""
    target = Path(path)
    new = target.with_name(f".{target.name}.new-{os.getpid()}")
    old = _old(target)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name in TENSORS:
            table = {k: v.detach().cpu().contiguous() for k, v in content.tensors[name].items()}
            save_file(table, str(new / f"{name}.safetensors"))
        for name in TEXTS:
            text = json.dumps(content.texts[name], allow_nan=True)
            (new / f"{name}.json").write_text(text, encoding="utf-8")
        files = {f: {"bytes": (new / f).stat().st_size, "sha256": _hash(new / f)} for f in FILES}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "torch": str(torch.__version__),
            "files": files,
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*FILES, MANIFEST):
            _flush(new / file)
        _flush(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        if not (target / MANIFEST).is_file():
            shutil.rmtree(new, ignore_errors=True)
            raise CheckpointError(f"{target} exists and is no checkpoint: it is not overwritten.")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What a checkpoint holds, once its manifest, sizes and hashes are found right.

    Raises:
        CheckpointError: There is none, or it is damaged, foreign, or of a newer version.
    """
    target = Path(path)
    if not target.exists() and _old(target).exists():
        target = _old(target)  # its successor was not finished
    try:
        manifest = _json(target / MANIFEST, 2**20)
        _check_manifest(manifest, target)
        tensors = {name: load_file(str(target / f"{name}.safetensors")) for name in TENSORS}
        texts = {name: _json(target / f"{name}.json", LARGEST_TEXT) for name in TEXTS}
    except (OSError, SafetensorError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"No checkpoint can be read from {path}: {error}") from error
    return Checkpoint(tensors, texts)


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
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{name} is missing from {folder}.")
        size = file.stat().st_size
        if not isinstance(facts, dict) or facts.get("bytes") != size:
            raise CheckpointError(f"{name} has {size} bytes, and not what its manifest says.")
        if facts.get("sha256") != _hash(file):
            raise CheckpointError(f"{name} is damaged: its hash is not the one in its manifest.")


def _json(path: Path, largest: int) -> Any:
    if path.stat().st_size > largest:
        raise ValueError(f"{path.name} is larger than {largest} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


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

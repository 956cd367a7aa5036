"""What `python -m tracker export` does: a checkpoint, and the code that builds its model, to a file or directory."""

from __future__ import annotations

import importlib
import json
import sys
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import nn

from tracker.engine import NeuronEngine
from tracker.errors import ExportError
from tracker.export.gguf import to_gguf
from tracker.export.hugging_face import to_hugging_face
from tracker.export.onnx import to_onnx
from tracker.export.record import needed
from tracker.export.registry import exporter_named, register_exporter

register_exporter("gguf", ".gguf")(to_gguf)
register_exporter("hf", "-hf")(to_hugging_face)
register_exporter("onnx", ".onnx")(to_onnx)


def export_checkpoint(
    path: str | PathLike[str],
    to: str,
    output: str | PathLike[str] | None = None,
    *,
    model: str = "",
    config: str = "",
    tokenizer: str = "",
    dtype: str = "f16",
) -> Any:
    """Build the fresh model of a checkpoint, load the checkpoint into it, and export it.

    Args:
        path: The checkpoint, a directory of `save_checkpoint`.
        to: "gguf", "hf", "onnx", or another exporter; see `exporter_named`.
        output: Where to write; None: beside the checkpoint.
        model: "module:function", which builds the model as it was before all changes; modules of the current folder
            are found.
        config: Of a model of transformers, instead: its `config.json`, or the directory that holds it.
        tokenizer: Directory of a tokenizer of transformers, for "gguf" and "hf".
        dtype: Of a GGUF file.

    Raises:
        ExportError: Neither or both of `model` and `config` are given, or the model cannot be built from it.
        CheckpointError: The checkpoint is damaged, or is not of this model.
        TrackerError: As the export itself.
    """
    write = exporter_named(to)
    if bool(model) == bool(config):
        raise ExportError(
            "A checkpoint holds no code. Say how the model is built that it was made from: --model module:function, or "
            "--config with the config.json of a model of transformers."
        )
    fresh = _called(model) if model else _configured(config)
    engine = NeuronEngine.load_checkpoint(path, fresh)
    goal = output or f"{fspath(path).rstrip('/')}{write.ending}"
    return write(engine, goal, tokenizer=tokenizer or None, dtype=dtype)


def _called(place: str) -> nn.Module:
    name, _, function = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        built = getattr(importlib.import_module(name), function)()
    except Exception as error:
        raise ExportError(
            f"--model {place} gives no model ({type(error).__name__}: {error}). It is module:function, such as "
            "train:build_model, called without arguments."
        ) from error
    if not isinstance(built, nn.Module):
        raise ExportError(f"--model {place} gives a {type(built).__name__}, and no nn.Module.")
    return built


def _configured(place: str) -> nn.Module:
    transformers = needed("transformers", "hf")
    file = Path(place) / "config.json" if Path(place).is_dir() else Path(place)
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(**data)
        kind: Any = getattr(transformers, (data.get("architectures") or [""])[0], None)
        built: nn.Module = (
            kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
        )
    except Exception as error:
        raise ExportError(
            f"--config {place} builds no model of transformers ({type(error).__name__}: {error})."
        ) from error
    return built

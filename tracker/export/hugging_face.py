"""A changed model of transformers as a directory that `from_pretrained` loads, layers of unequal widths included."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import nn

from tracker.engine import NeuronEngine
from tracker.errors import ExportError, VerificationError
from tracker.export.compare import current_model, example_calls, require_equal
from tracker.export.destination import whole_or_nothing
from tracker.export.plain import to_plain
from tracker.export.record import Exported, needed, size_of
from tracker.export.uneven import MODULE, Uneven, compared_with_configuration, modelling_file
from tracker.inputs.calls import Call
from tracker.integrations.pretrained import fields_of, set_fields


def to_hugging_face(
    engine: NeuronEngine,
    path: str | PathLike[str],
    tokenizer: Any = None,
    *,
    verify: bool = True,
) -> Exported:
    """Write the current model as a directory that `from_pretrained` loads without this library.

    Where a configuration gives the widths that the model has, its class loads it as any other. Where layers differ, the
    directory has a small modelling file of its own: it makes the model as its class does and then gives each tensor the
    size that `config.json` lists. It loads by `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.

    Args:
        engine: Its current model is written; it is not changed.
        path: The directory. An earlier export that is there is replaced once the new one is checked.
        tokenizer: One of transformers, or a directory of one: it is saved beside the model.
        verify: Load the directory, run it on the example inputs, and compare.

    Raises:
        ExportError: It is no model of transformers, or has parts or values that its class would not make from the
            configuration; the message names the first.
        SurgeryError, VerificationError, StructureError: As `to_plain`. Nothing was written.

    Examples:
        >>> from tracker.export import to_hugging_face
        >>> to_hugging_face(engine, "folder")  # doctest: +SKIP
    """
    needed("transformers", "hf")
    model: Any = current_model(engine)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ExportError(
            f"A {type(model).__name__} is no model of transformers. For others: to_onnx, or torch.save of to_plain."
        )
    plain: Any = to_plain(engine, verify=verify)
    _forget_gguf(plain)
    calls = example_calls(engine) if verify else ()
    built = copy.deepcopy(plain.config)
    set_fields(plain.config, fields_of(plain, engine))
    left = compared_with_configuration(plain)
    # Numbers that modules keep may be stale or may count: running it tells.
    if not left or (verify and not left.shapes):
        try:
            return _written(model, plain, Uneven(), path, tokenizer, calls)
        except VerificationError:
            if not left:
                raise
    plain.config = built
    left = compared_with_configuration(plain)
    return _written(model, plain, left, path, tokenizer, calls)


def _forget_gguf(plain: Any) -> None:
    """Of a model that was read from a GGUF file, whose weights are ordinary: transformers would not write it."""
    method = getattr(getattr(plain.config, "quantization_config", None), "quant_method", "")
    if getattr(method, "value", method) == "gguf":
        plain.hf_quantizer = None
        del plain.config.quantization_config


def _written(
    model: nn.Module,
    plain: Any,
    uneven: Uneven,
    path: str | PathLike[str],
    tokenizer: Any,
    calls: Sequence[Call],
) -> Exported:
    difference = None
    with whole_or_nothing(path, "directory") as made:
        plain.save_pretrained(made)
        if uneven:
            _add_modelling_file(plain, uneven, made)
        _save_tokenizer(tokenizer, made)
        if calls:
            loaded = _loaded(plain, made, bool(uneven))
            difference = require_equal(model, loaded, calls, "The model that from_pretrained loads")
        size = size_of(made)
    notes = (f"load it with trust_remote_code=True: its layers are made by {MODULE}.py",)
    checked = "from_pretrained" if calls else ""
    return Exported(Path(path), "hugging face", size, difference, checked, notes if uneven else ())


def _add_modelling_file(plain: Any, uneven: Uneven, folder: Path) -> None:
    kind = type(plain)
    (folder / f"{MODULE}.py").write_text(modelling_file(kind), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["uneven"] = uneven.to_dict()
    config["architectures"] = [f"Uneven{kind.__name__}"]
    config["auto_map"] = dict.fromkeys(_auto_classes(plain), f"{MODULE}.Uneven{kind.__name__}")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _auto_classes(plain: Any) -> list[str]:
    """Names of the classes of transformers that load models of this class."""
    auto = needed("transformers.models.auto.modeling_auto", "hf")
    found = []
    for name, kind in sorted(vars(auto).items()):
        mapping = getattr(kind, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None:
            made = mapping.get(type(plain.config), None)
            if type(plain) in (made if isinstance(made, tuple) else (made,)):
                found.append(name)
    if not found:
        raise ExportError(
            f"No class AutoModel… of transformers loads a {type(plain).__name__}, and its layers are of unequal "
            "widths: save_pretrained_uniform makes them equal."
        )
    return found


def _loaded(plain: Any, folder: Path, uneven: bool) -> nn.Module:
    kind: Any = type(plain)
    options: dict[str, Any] = {"dtype": plain.dtype, "local_files_only": True}
    options["attn_implementation"] = plain.config._attn_implementation
    if uneven:
        auto = needed("transformers", "hf")
        kind = getattr(auto, _auto_classes(plain)[0])
        options["trust_remote_code"] = True
    try:
        loaded: nn.Module = kind.from_pretrained(folder, **options).to(plain.device)
    except Exception as error:
        raise ExportError(
            f"What was written does not load ({type(error).__name__}: {error}). Nothing is kept of it."
        ) from error
    return loaded


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | PathLike):
        auto = needed("transformers", "hf").AutoTokenizer
        tokenizer = auto.from_pretrained(fspath(tokenizer), local_files_only=True)
    tokenizer.save_pretrained(folder)

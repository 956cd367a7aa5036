"""Saving a changed Hugging Face model so that `from_pretrained` loads it: equal widths, and a configuration of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from tracker.engine import NeuronEngine
from tracker.errors import StructureError, SurgeryError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.journal.state_dict_hooks import weights_of
from tracker.surgery import Receipt
from tracker.surgery.operations.uniform_widths import Key, key_of
from tracker.surgery.transaction import unchanged
from tracker.utils.nested import tensors_in

# Fields by which configurations name the width of an MLP, and the numbers of heads.
MLP = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim",
    "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
PAIRED = ("num_key_value_heads",)  # heads of keys and values, where several of queries share one
CLOSE = 1e-4  # of the largest output, between the model and the one that the configuration builds


def save_pretrained_uniform(
    engine: NeuronEngine, path: str | PathLike[str], *, shrink: bool = False, seed: int = 0
) -> Receipt | None:
    """Make the current model's layers equally wide, set its configuration to match, and call its `save_pretrained`.

    `type(model).from_pretrained(path)` then gives the same outputs. Widths become those of the widest layer of a kind,
    without a change of the function (or, with `shrink`, of the narrowest; see `uniform_widths`). Where the
    configuration has no field for one (heads of GPT-2, which share the width of the stream), what it has stays, and
    the layers grow to it, again without a change of the function. Before anything is saved, a model of the
    configuration with these weights is run on the example inputs and compared.

    Returns:
        The receipt of the last change of widths, None where none was needed; `engine.undo()` takes it back.

    Raises:
        SurgeryError: It is no model of transformers, or no configuration gives what became of it: then model and
            configuration are as they were, and nothing was saved.
    """
    tracker = engine.tracker
    model: Any = tracker.current.model()
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SurgeryError(
            f"A {type(model).__name__} has no configuration to save. For models of other libraries: save_checkpoint, "
            "and apply_journal on a freshly built model."
        )
    with engine.sessions.current.transaction() as change:
        receipt = engine.uniform_widths(shrink=shrink, seed=seed)
        fields = fields_of(model, engine)
        missing = _short(model, engine, fields)
        receipt = engine.surgeon.to_widths(missing, "save_pretrained_uniform", seed=seed) or receipt
        _require_same_outputs(model, engine, fields)
        before = {name: getattr(model.config, name) for name in fields}
        change.log.add(lambda: set_fields(model.config, before))
        set_fields(model.config, fields)
        model.save_pretrained(path, state_dict=weights_of(model))
        change.receipt = receipt or unchanged("save_pretrained_uniform", tracker.current)
    return receipt


def fields_of(model: Any, engine: NeuronEngine) -> dict[str, Any]:
    """Fields of the configuration, set anew one after the other as long as fewer tensors differ in shape."""
    found: dict[str, Any] = {}
    least = len(shape_differences(model, found) or {})
    for edit in _edits(model.config, engine):
        if not least:
            break
        different = shape_differences(model, {**found, **edit})
        if different is not None and len(different) < least:
            found, least = {**found, **edit}, len(different)
    return found


def _edits(config: Any, engine: NeuronEngine) -> Iterator[dict[str, Any]]:
    """What may have to be set, from the sizes of the model's groups."""
    groups = engine.structure.groups
    for name in MLP:
        if hasattr(config, name):
            sizes = dict.fromkeys(g.size for g in groups if g.kind == "neuron")
            yield from ({name: size} for size in sizes if size != getattr(config, name))
    for name in HEADS:
        heads = getattr(config, name, None)
        paired = {n: getattr(config, n) for n in PAIRED if getattr(config, n, None)}
        each = next(iter(paired.values()), heads)
        if heads is None or not each:
            continue
        # Implied by the number of heads unless it is said.
        fixed = {"head_dim": config.head_dim} if getattr(config, "head_dim", None) else {}
        for size in range(1, each):
            yield {name: heads * size // each, **dict.fromkeys(paired, size), **fixed}


def _short(model: Any, engine: NeuronEngine, fields: Mapping[str, Any]) -> dict[Key, int]:
    """Groups that have fewer units than the configuration gives them, with the units that it gives."""
    different, wanted = shape_differences(model, fields) or {}, dict[Key, int]()
    for group in engine.structure.groups:
        if not group.exact or group.kind == "head_dim":  # of heads and their dimensions, heads
            continue
        for (name, dim), indices in group.members[0].items():
            have, given = different.get(name, ((), ()))
            if len(have) == len(given) and dim < len(have) and given[dim] > have[dim]:
                units, rest = divmod(given[dim] - have[dim], len(indices))
                if not rest:
                    wanted[key_of(group)] = group.size + units
    return wanted


def shape_differences(
    model: Any, fields: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Shapes of tensors in the model, and in one that the configuration with these fields builds; None if none does."""
    try:
        with torch.device("meta"):
            fresh = _build(model, fields)
    except Exception:  # whatever a constructor does not take
        return None
    mine = {name: tuple(t.shape) for name, t in weights_of(model).items() if hasattr(t, "shape")}
    others = {name: tuple(t.shape) for name, t in fresh.state_dict().items()}
    names = sorted({*mine, *others})
    return {n: (mine.get(n, ()), others.get(n, ())) for n in names if mine.get(n) != others.get(n)}


def _require_same_outputs(model: Any, engine: NeuronEngine, fields: Mapping[str, Any]) -> None:
    different = shape_differences(model, fields)
    if different is None or different:
        what = "its constructor takes no such numbers"
        if different:
            name, (have, given) = next(iter(different.items()))
            what = f"{name} has the shape {have}, and would have {given}"
        raise SurgeryError(
            f"No configuration of {type(model.config).__name__} gives what became of the model: {what}. Save it with "
            "save_checkpoint, and load it with apply_journal on a freshly built model."
        )
    with torch.random.fork_rng(devices=[]):
        fresh = _build(model, fields)
    reference: nn.Module = copy_without_hooks(model)
    fresh.to(next(model.parameters()).device, next(model.parameters()).dtype)
    fresh.load_state_dict(weights_of(model))
    inputs = engine.tracker.current.observer.inputs
    if inputs is None:
        raise StructureError("There are no example inputs to compare the two models on.")
    before, after = (
        [
            t.double()
            for t in tensors_in(forward_once(m, Arguments(*inputs)))
            if t.is_floating_point()
        ]
        for m in (reference, fresh)
    )
    for a, b in zip(before[:1], after[:1], strict=True):
        apart = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
        if not apart <= CLOSE:
            raise SurgeryError(
                f"A model of the configuration errs by {apart:.1e}, though its shapes are right: something else than "
                "widths follows from a number that went, such as the scale of attention. Save it with "
                "save_checkpoint, and load it with apply_journal on a freshly built model."
            )


def _build(model: Any, fields: Mapping[str, Any]) -> Any:
    config = copy.deepcopy(model.config)
    set_fields(config, fields)
    type(config).from_dict(config.to_dict())  # as loading does, with the checks of its own
    return type(model)(config)


def set_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Give a configuration these values."""
    for name, value in fields.items():
        setattr(config, name, value)

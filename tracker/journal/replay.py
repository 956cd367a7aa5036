"""Do the changes of a journal once more: on a copy without values first, and on the model only if all of it fits."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import CheckpointError
from tracker.inputs.forward_pass import computed_tensors
from tracker.modules.kinds import weight_of
from tracker.modules.layers import known_width
from tracker.structure.adapters.registry import adapt as adapt_module
from tracker.structure.adapters.registry import is_adapted
from tracker.structure.adapters.transformers_stacks import CONFIGS, config_of, count_name
from tracker.structure.code_sizes.attributes import sync_attributes, tensors
from tracker.structure.code_sizes.traced_int import Attribute, instrumented_copy, missing_attributes
from tracker.surgery.inserted_modules import (
    INSERTED,
    Bypass,
    ReluIdentity,
    ResidualBlock,
    is_layer,
    put_module,
    replace_module,
)
from tracker.surgery.operations.block_copies import copied, is_block
from tracker.surgery.optimizer_state.moments import moved
from tracker.surgery.undo import UndoLog, rewrite, writable

if TYPE_CHECKING:
    from tracker.journal.entries import Entry

LAYERS = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
# Of torch's modules, the integers that no change of widths moves.
NO_SIZES = (
    "padding",
    "stride",
    "kernel_size",
    "dilation",
    "output_padding",
    "num_layers",
    "padding_idx",
)
GROWTH = 64  # times larger than at first, and than what was saved, a model may be in between
LEAST = 2**24  # numbers that it may have in any case
BLOCKS = ("ReluIdentity", "ResidualBlock")
# What older journals say of a bypass: its scale and shift.
PASSED = {"input": (1.0, 0.0), "zero": (0.0, 0.0)}


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers: caches that a forward pass makes are no part of a model."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {name: t for name, t in tensors(model).items() if name not in passing}


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a model's parameters and persistent buffers."""
    return fingerprint_of(persistent_tensors(model))


def fingerprint_of(table: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model that has these parameters and persistent buffers."""
    text = "\n".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(table.items())
    )
    return hashlib.sha256(text.encode()).hexdigest()


def meta_model_after(model: nn.Module, entries: Iterable[Entry], saved: float = 0) -> nn.Module:
    """A copy of the model without values, after these changes. The model is not touched.

    saved: Numbers that lie beside the journal. On the way the copy has at most GROWTH times those and the model's.

    Raises:
        CheckpointError: An entry does not fit the model.
    """
    held = {id(t): t for t in tensors(model).values()}
    try:
        meta_model = without_values(model)
    except Exception as error:
        raise CheckpointError(f"This {type(model).__name__} cannot be copied: {error}") from error
    most = max(LEAST, GROWTH * (sum(t.numel() for t in held.values()) + saved))
    now, known = fingerprint(meta_model), set[Attribute]()
    for number, entry in enumerate(entries, start=1):
        what = f"Entry {number} of the journal, {entry.operation},"
        if now != entry.before:
            raise CheckpointError(
                f"{what} does not fit this model: its tensors then had other names or shapes. Build the model with "
                "the code and the sizes that it had at first."
            )
        try:
            _change(meta_model, entry, known)
        except Exception as error:
            raise CheckpointError(f"{what} does not fit this model: {error}") from error
        if entry.slots or entry.modules or entry.attributes:
            now = fingerprint(meta_model)
        if sum(t.numel() for t in tensors(meta_model).values()) > most:
            raise CheckpointError(
                f"{what} would make the model more than {GROWTH} times as large as it is and what was saved."
            )
        if now != entry.after:
            raise CheckpointError(f"{what} gives other shapes than it did.")
    return meta_model


def load_architecture(
    model: nn.Module,
    meta_model: nn.Module,
    values: Mapping[str, Tensor],
    modules: Iterable[str],
    integers: Iterable[Attribute],
    log: UndoLog,
    optimizers: Sequence[Optimizer] = (),
) -> None:
    """Give the model the architecture of `meta_model`, and these values; zeros where there are none and shapes changed.

    `values` were compared with it. The `Parameter` objects stay; the log takes everything back.

    Args:
        model: It is changed in place.
        meta_model: A copy of the model, changed, without values.
        values: Of tensors.
        modules: Names under which it has other modules than the model, or none.
        integers: Of the model's code, that may differ.
        log: How to take it back.
        optimizers: Which the parameters of new modules join.
    """
    device = next((t.device for t in tensors(model).values()), torch.device("cpu"))
    with writable():
        for name in modules:
            path, _, child = name.rpartition(".")
            parent, theirs = _module(model, path), _module(meta_model, name)
            if parent is None:
                continue
            if theirs is None and child in parent._modules:
                put_module(model, name, None, log)
            elif theirs is not None and parent._modules.get(child) is not theirs:
                near = next(parent.parameters(), None)
                known = dict(parent.named_buffers())
                own = theirs.to_empty(device=device if near is None else near.device)
                own.train(parent.training)
                for key, buffer in own.named_buffers():  # of copies, what no checkpoint holds
                    if key in known and known[key].shape == buffer.shape:
                        buffer.copy_(known[key])
                replace_module(model, name, own, optimizers, log)
        shapes = {name: tensor.shape for name, tensor in tensors(meta_model).items()}
        for name, tensor in tensors(model).items():
            if name in values:
                _swap(tensor, values[name], log)
            elif tensor.shape != shapes[name]:
                _swap(tensor, torch.zeros(shapes[name], dtype=tensor.dtype), log)
        for name, module in meta_model.named_modules():
            mine = model.get_submodule(name)
            if is_adapted(module) and type(mine) is not type(module):
                _adapt_module(mine, log)
        named = dict.fromkeys(integers)
        sync_attributes(
            model,
            {
                a: value_of(meta_model, a)
                for a in named
                if not missing_attributes(meta_model, {a: 0})
            },
            log.add,
        )


def places(entries: Iterable[Entry]) -> tuple[list[str], list[Attribute]]:
    """Names of the modules that changes put in place, and the integers of the model's code that they set."""
    entries = list(entries)
    modules = dict.fromkeys(name for entry in entries for name in entry.modules)
    return list(modules), list(dict.fromkeys(a for entry in entries for a in entry.attributes))


def moved_buffers(model: nn.Module, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Contents of buffers that are in no state dict, after these changes; zero in slots that came with them."""
    kept, contents = persistent_tensors(model), dict[str, Tensor]()
    held = {name: t for name, t in tensors(model).items() if name not in kept}
    for entry in entries:
        for name in held.keys() & entry.slots.keys():
            slots = {dim: runs.slots() for dim, runs in entry.slots[name].items()}
            contents[name] = moved(contents.get(name, held[name]), slots)
    return contents


def module_spec(module: nn.Module) -> dict[str, Any]:
    """Plain data from which a module that came with a change can be made again."""
    if isinstance(module, Bypass):
        return {
            "kind": "Bypass",
            "returns": module.returns,
            "scale": module.scale,
            "shift": module.shift,
        }
    if not isinstance(module, ReluIdentity | ResidualBlock):
        return {"kind": "Copy"}  # of the block that it stands behind
    layer: Any = module.linear if isinstance(module, ReluIdentity) else module.into
    width = layer.weight.shape[0]
    return {"kind": type(module).__name__, "layer": type(layer).__name__, "width": width}


def _change(meta_model: nn.Module, entry: Entry, known: set[Attribute]) -> None:
    """known: Integers of the copy's code, as far as they were asked for."""
    if not (entry.slots or entry.modules or entry.attributes):
        return
    held, sizes = tensors(meta_model), list[tuple[int, int]]()
    for name, dims in entry.slots.items():
        shape = list(held[name].shape) if name in held else []
        for dim, runs in dims.items():
            if not 0 <= dim < len(shape) or runs.reach > shape[dim] or not runs.size:
                raise ValueError(f"{name} has no such slots of dimension {dim}")
            sizes.append((shape[dim], runs.size))
            shape[dim] = runs.size
        held[name].data = torch.empty(shape, dtype=held[name].dtype, device="meta")
    if entry.attributes:
        if not known:
            known |= set(instrumented_copy(meta_model)[1])
        unknown = next((a for a in entry.attributes if a not in known), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown} of {unknown.module or 'the model'} is no integer of its code"
            )
        copies = sum(spec["kind"] == "Copy" for spec in entry.modules.values())
        rest = {
            a: v
            for a, v in entry.attributes.items()
            if not _counts_blocks(meta_model, a, v - copies)
        }
        _require_sizes(meta_model, rest, sizes)
    sync_attributes(meta_model, entry.attributes, lambda back: None)
    for name, spec in entry.modules.items():
        replace_module(meta_model, name, _built(meta_model, name, spec), [], UndoLog())
        known.clear()


def _require_sizes(
    meta_model: nn.Module, attributes: Mapping[Attribute, int], moved: Sequence[tuple[int, int]]
) -> None:
    """Integers that a change solves for move as an axis does that it `moved` (size before, after)."""
    for attribute, value in attributes.items():
        was, module = value_of(meta_model, attribute), meta_model.get_submodule(attribute.module)
        ours = type(module).__module__.startswith("torch.nn.") and not attribute.owner
        if ours and attribute.name in NO_SIZES and value != was:
            raise ValueError(f"{attribute.name} of {attribute.module} is no size of a tensor")
        if value != was and not any(_follows(was, value, *sizes) for sizes in moved):
            raise ValueError(
                f"{attribute.name} of {attribute.module or 'the model'} cannot be {value}: no axis moved like that"
            )


def _counts_blocks(meta_model: nn.Module, attribute: Attribute, before: int) -> bool:
    """Whether it is how many blocks a configuration counts, and was so many before copies were inserted."""
    if attribute.module or attribute.owner not in CONFIGS:
        return False
    config = config_of(meta_model, attribute.owner)
    return attribute.name == count_name(config) and vars(config).get(attribute.name) == before


def _follows(was: int, value: int, old: int, new: int) -> bool:
    """Whether an integer moved like an axis: by its share, or by one of the equal parts that its slots make up."""
    if value < 1 or old == new:
        return False
    step, slots = value - was, new - old
    return was * new == value * old or (step * slots > 0 and slots % step == 0)


def _built(meta_model: nn.Module, name: str, spec: Mapping[str, Any]) -> nn.Module:
    path, _, child = name.rpartition(".")
    kind = spec["kind"]
    if kind == "Bypass":
        if not name or _module(meta_model, name) is None:
            raise ValueError(f"there is no {name!r} to bypass")
        line = PASSED[spec["passes"]] if "passes" in spec else (spec["scale"], spec["shift"])
        finite = all(type(value) is float and math.isfinite(value) for value in line)
        if spec["returns"] not in ("tensor", "tuple") or not finite:
            raise ValueError("an unknown bypass")
        return Bypass(spec["returns"], *line)
    mate = _module(meta_model, path)
    if kind == "Copy":
        if child != INSERTED or mate is None or INSERTED in mate._modules or not is_block(mate):
            raise ValueError(f"no copy of {path!r} can stand behind it")
        return copied(meta_model, path)
    if kind not in BLOCKS or child != INSERTED or mate is None or not is_layer(mate):
        raise ValueError(f"unknown module {kind!r} at {name!r}")
    width, make = spec["width"], LAYERS[spec["layer"]]
    if INSERTED in mate._modules or width != (known_width(mate) or (0, -1))[0]:
        raise ValueError(f"no layer of {width!r} can stand behind {path!r}")
    options: dict[str, Any] = {"device": "meta", "dtype": weight_of(mate).dtype}
    more = () if make is nn.Linear else (1,)
    with torch.random.fork_rng(devices=[]):
        layers = [make(width, width, *more, **options) for _ in range(1 + BLOCKS.index(kind))]
    return (ReluIdentity, ResidualBlock)[BLOCKS.index(kind)](*layers)


def without_values(module: nn.Module) -> nn.Module:
    """A copy of a module that has the shapes of its tensors and no values."""
    held = {id(t): _valueless(t) for t in tensors(module).values()}
    return copy.deepcopy(module, computed_tensors(module) | held)


def _valueless(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        raise CheckpointError(f"A {type(tensor).__name__} cannot be restored in place.")
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def value_of(model: nn.Module, attribute: Attribute) -> int:
    """What an integer of the model's code is now.

    Raises:
        KeyError: It has none.
    """
    holder: Any = model.get_submodule(attribute.module)
    for name in attribute.owner:
        holder = vars(holder)[name]
    value = vars(holder)[attribute.name]
    return int(value if attribute.index is None else value[attribute.index])


def _adapt_module(module: nn.Module, log: UndoLog) -> None:
    kind, before = type(module), dict(vars(module))

    def back() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(before)

    log.add(back)
    adapt_module(module)


def _swap(tensor: Tensor, value: Tensor, log: UndoLog) -> None:
    # A saved value lies in memory as it did: kernels round by that.
    rewrite(tensor, value.to(tensor.device).clone(memory_format=torch.preserve_format), None, log)

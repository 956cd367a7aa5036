"""A copy of a changed model that needs nothing of this library: ordinary modules of torch, and no hooks."""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import Any

import torch
from torch import nn

from tracker.engine import NeuronEngine
from tracker.errors import SurgeryError, VerificationError
from tracker.export.compare import current_model, example_calls, require_equal
from tracker.export.stacks import write_out_stacks
from tracker.export.write_out import residual, write_out_attention, write_out_bypass
from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import copy_of, forward_once
from tracker.structure.adapters.attention import DecoupledMultiheadAttention
from tracker.structure.adapters.registry import is_adapted, kind_of
from tracker.surgery.inserted_modules import INSERTED, Bypass, ReluIdentity, ResidualBlock

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_OF_HOOKS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_OURS = "_tracker_"  # attributes that this library sets on models begin like this


def to_plain(engine: NeuronEngine, *, verify: bool = True) -> nn.Module:
    """A copy of the current model made of ordinary modules: `torch.save` of it loads without this library.

    Inserted layers stand behind their layer in an `nn.Sequential`, copies of blocks in the list of their block; blocks
    that were removed are gone from their list, other modules that were removed are an `nn.Identity` or the small graph
    that is left of them. `nn.MultiheadAttention` without some of its heads is torch's own with a projection of the
    queries before it. Hooks of torch itself (weight norm, pruning masks) stay, all other hooks are left out. It can be
    scripted, traced, exported and quantized where the original could.

    Args:
        engine: Its current model is copied; it is not changed.
        verify: Run both on the example calls, and compare.

    Returns:
        A model with tensors of its own, on the same device, in the same mode.

    Raises:
        SurgeryError: A part of the model cannot be written with ordinary modules; the message names it.
        VerificationError: The outputs differ.
        StructureError: The model cannot be copied, or there are no example calls and `verify` is set.

    Examples:
        >>> from tracker.export import to_plain
        >>> receipt = engine.prune_neurons({"0": [1]})
        >>> plain = to_plain(engine)
        >>> torch.equal(plain(x), model(x))
        True
    """
    model = current_model(engine)
    calls = example_calls(engine) if verify else engine.tracker.current.observer.calls
    try:
        plain = _written_out(model, calls, drop=True)
        if verify:
            require_equal(model, plain, calls, "The model of ordinary modules")
    except VerificationError:
        # A forward that finds its blocks by number: what was removed keeps its place.
        plain = _written_out(model, calls, drop=False)
        require_equal(model, plain, calls, "The model of ordinary modules")
    _require_nothing_of_ours(plain)
    return plain


def _written_out(model: nn.Module, calls: tuple[Call, ...], *, drop: bool) -> nn.Module:
    plain = copy_of(model)
    called = _arguments_of_bypasses(model, calls)
    for module in plain.modules():
        _without_hooks(module)
        for name in [n for n in vars(module) if n.startswith(_OURS)]:
            del vars(module)[name]
    write_out_stacks(plain, drop=drop)
    # The innermost first: what was inserted may have layers behind it.
    for name, module in reversed(list(plain.named_modules())):
        new = _instead(name, module, called)
        if new is not module:
            plain = _put(plain, module, new)
    return plain


def _instead(
    name: str,
    module: nn.Module,
    called: dict[str, set[tuple[int, frozenset[str]]]],
) -> nn.Module:
    """The ordinary module for one of ours, or the module itself."""
    new = module
    if isinstance(module, ResidualBlock):
        new = residual(module)
    elif isinstance(module, ReluIdentity):
        new = nn.Sequential(nn.ReLU().train(module.training), module.linear)
        new.training = module.training
    elif isinstance(module, Bypass):
        simple = called.get(name, set()) <= {(1, frozenset())}
        new = write_out_bypass(module, simple=simple)
    elif isinstance(module, DecoupledMultiheadAttention):
        new = write_out_attention(module)
    elif is_adapted(module):
        raise SurgeryError(
            f"The module {name!r} lost heads or dimensions, and the forward of {kind_of(module).__name__} ties their "
            "sizes to others: no ordinary module computes it. Export the model to "
            "ONNX, or use save_checkpoint and apply_journal."
        )
    inserted = module._modules.pop(INSERTED, None)
    if inserted is not None:
        new = nn.Sequential(new, *(inserted if type(inserted) is nn.Sequential else [inserted]))
        new.training = module.training
    return new


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` is; the model, which may be `new` itself."""
    inside = {id(m) for m in new.modules()}
    for parent in [m for m in model.modules() if id(m) not in inside]:
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return new if model is old else model


def _without_hooks(module: nn.Module) -> None:
    kept = set()
    for table in _HOOKS:
        hooks: dict[int, Any] = getattr(module, table, {})
        for key in [k for k, hook in hooks.items() if not _is_of_torch(hook)]:
            del hooks[key]
        kept |= set(hooks)
    for table in _OF_HOOKS:
        marks: dict[int, bool] = getattr(module, table, {})
        for key in [k for k in marks if k not in kept]:
            del marks[key]


def _is_of_torch(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # torch wraps some
    owner = hook if hasattr(hook, "__qualname__") else type(hook)
    return (getattr(owner, "__module__", None) or "").startswith("torch.")


def _arguments_of_bypasses(
    model: nn.Module, calls: tuple[Call, ...]
) -> dict[str, set[tuple[int, frozenset[str]]]]:
    """How each bypass is called: how many positional arguments, and the names of the others."""
    found: dict[str, set[tuple[int, frozenset[str]]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Bypass):
            seen = found[name] = set()

            def note(_: Any, args: Any, kwargs: Any, seen: set[Any] = seen) -> None:
                seen.add((len(args), frozenset(kwargs)))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        for call in calls if handles else ():
            for one in call.modes():
                forward_once(model, one)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _require_nothing_of_ours(plain: nn.Module) -> None:
    """Save it, and see whether the file names this library.

    Raises:
        SurgeryError: It does.
    """
    buffer = io.BytesIO()
    try:
        with torch.serialization.skip_data():
            torch.save(plain, buffer)
    except Exception:  # a model of local classes, say, could not be saved before either
        named = {type(m).__module__ for m in plain.modules()}
    else:
        with zipfile.ZipFile(buffer) as archive:
            inside = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            named = {
                str(value).split(" ")[0]
                for code, value, _ in pickletools.genops(archive.read(inside))
                if code.name == "GLOBAL"  # in the protocol that torch.save writes
            }
    ours = sorted(n for n in named if n == "tracker" or n.startswith("tracker."))
    if ours:
        raise SurgeryError(
            f"A part of the model is of {ours[0]}, and a file of it would not load without this library. "
            "Remove what of this library the model holds as an attribute."
        )

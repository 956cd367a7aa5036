"""One forward pass that leaves no trace in the model."""

from __future__ import annotations

import copy
import gc
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tracker.errors import StructureError
from tracker.inputs.calls import Arguments, Call, ExampleInputs, arguments
from tracker.inputs.hook_tables import hooks_kept
from tracker.inputs.repeatable import (
    certain,
    open_modules,
    random_states_kept,
    unheard,
    writes_put_back,
)
from tracker.utils.empty_tables import empty_tables


def forward_once(
    model: nn.Module,
    call: ExampleInputs | Arguments,
    within: AbstractContextManager[object] | None = None,
    *,
    heard: bool = False,
    given: str = "the example inputs",
    watch_writes: bool = False,
) -> object:
    """The output of one call of the model, without gradients, the call itself `within` a context.

    It is made in eval mode, unless it is a `Call` in train mode; there nothing is drawn at random.

    Training flags, buffers, attributes and random states are as before afterwards; so are weights
    that the model's code writes into (an embedding's `max_norm`), if the pass is in train mode, `within` a context, or
    asked to `watch_writes`. No engine observes this pass, unless it is to be `heard`. `given`: what it is called with,
    for messages.

    Raises:
        StructureError: The forward pass failed.
    """
    args, kwargs = arguments(call)
    method = call.method if isinstance(call, Call) else "forward"
    training = isinstance(call, Call) and call.training is True
    modules = list(model.modules())
    with (
        _unchanged(modules),
        _plain(modules),
        torch.no_grad(),
        nullcontext() if heard else _internal_pass(),
    ):
        for module in modules:  # model.train is the user's: it may merge weights, say
            module.training = training
        try:
            with within or nullcontext(), _left_alone(modules, training, watch_writes or within):
                return (model if method == "forward" else getattr(model, method))(*args, **kwargs)
        except Exception as error:
            raise StructureError(
                f"{_the_pass(call)} of {type(model).__name__} with {given} failed ({type(error).__name__}: {error}). "
                + _WAYS.get(
                    given,
                    "Pass batches that the model accepts, or say what it takes of them: `inputs=`.",
                )
            ) from error


def is_probing() -> bool:
    """Whether the pass under way is one of ours, and no new data."""
    return _probes.get() > 0


def is_running(model: nn.Module) -> bool:
    """Whether a forward pass of the model, or of a module in it, is under way in any thread.

    The stack tells, and not what hooks noted: a pass that was broken off leaves no trace.
    """
    own = {id(module) for module in model.modules()}
    for frame in sys._current_frames().values():
        inner: FrameType | None = frame
        while inner is not None:
            if inner.f_code is _CALL and id(inner.f_locals.get("self")) in own:
                return True
            inner = inner.f_back
    return False


_CALL = nn.Module._call_impl.__code__
_WAYS = {
    "the example inputs": "Pass example_inputs that the model accepts: a tuple of positional arguments, a dict of "
    "keyword arguments, one tensor, or a list of several calls."
}


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`; `memo` as of `copy.deepcopy`. Hooks that cannot be copied are shared.

    Raises:
        StructureError: The model cannot be copied.
    """
    memo = {} if memo is None else memo  # the caller's: it is filled
    for key, tensor in computed_tensors(model).items():
        memo.setdefault(key, tensor)
    for key, table in empty_tables(model.modules()).items():
        memo.setdefault(key, table)
    known = dict(memo)
    try:
        try:
            copied = copy.deepcopy(model, memo)
        except TypeError:  # a hook may be a method of anything: a logger, an engine
            for m in model.modules():
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks):
                    known |= {id(hook): hook for hook in hooks.values()}
            memo.clear()
            memo.update(known)
            copied = copy.deepcopy(model, memo)
        # What is tried on a copy would be done to the model.
        theirs = {id(m) for m in model.modules()}
        if own := [n for n, m in copied.named_modules() if id(m) in theirs]:
            raise TypeError(f"{own[0] or 'the model'} gives itself for its copy")
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and every change is tried on "
            "a copy first. Keep what cannot be copied out of its modules, or give it a __deepcopy__."
        ) from error
    return copied


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of tensors that modules keep of their last pass: with its graph they bear no deepcopy.

    Pruning masks and the older spectral norm of torch keep the weight that they computed.
    """
    held = [
        value
        for module in model.modules()
        for values in (vars(module), *_containers(module))
        for value in (values.values() if isinstance(values, dict) else values)
        if isinstance(value, Tensor)
    ]
    return {id(t): t.detach().clone() for t in held if not t.is_leaf}


def copy_without_hooks(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors with `model`, and whose passes are not seen by the hooks that users put on it.

    Hooks of torch itself (weight norm, pruning masks) and of inserted layers are part of what the model computes, and
    stay.
    """
    tensors = (*model.parameters(), *model.buffers())
    copied = copy_of(model, {id(t): t for t in tensors})
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if not _is_of_the_model(hook)]:
                del hooks[key]
    return copied


def _is_of_the_model(hook: object) -> bool:
    owner = hook if hasattr(hook, "__qualname__") else type(hook)
    return (getattr(owner, "__module__", None) or "").startswith(("torch.", "tracker."))


@contextmanager
def tables_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever is set in the modules' own tables inside is put back: attributes, parameters, buffers, hooks.

    So is what lists and dicts among the attributes hold.
    """
    saved = [
        (table, _copied(table)) for module in open_modules(modules) for table in _tables(module)
    ]
    try:
        with hooks_kept(modules):
            yield
    finally:
        for table, before in saved:
            _put_back_entries(table, before)


def _tables(module: nn.Module) -> Iterator[Table]:
    yield from (vars(module), module._parameters, module._buffers)
    yield from _containers(module)


def _containers(module: nn.Module) -> Iterator[Table]:
    """Lists and dicts among a module's attributes that are not part of each module."""
    for name, value in vars(module).items():
        if name not in _OF_EACH_MODULE and isinstance(value, (dict, list)):
            yield value


def _copied(table: Table) -> Table:
    return dict.copy(table) if isinstance(table, dict) else list(table)


def _put_back_entries(table: Table, before: Table) -> None:
    if isinstance(table, list):
        if len(table) != len(before) or any(map(operator.is_not, table, before)):
            table[:] = before
        return
    if list(dict.keys(table)) != list(before):
        dict.clear(table)
    dict.update(table, before)


Table = dict[Any, Any] | list[Any]
_OF_EACH_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def gc_paused() -> Iterator[None]:
    """No search for garbage inside: many small objects are made that all stay, each search goes through all others."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_probes: ContextVar[int] = ContextVar("probes", default=0)


@contextmanager
def _internal_pass() -> Iterator[None]:
    token = _probes.set(_probes.get() + 1)
    try:
        yield
    finally:
        _probes.reset(token)


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether `fully_shard` (FSDP2) spread any of them: their parameters come and go in each pass."""
    kinds = set(map(type, modules))
    return any(base.__name__ == "FSDPModule" for kind in kinds for base in kind.__mro__)


@contextmanager
def _left_alone(modules: Sequence[nn.Module], training: bool, watched: object) -> Iterator[None]:
    """A pass inside leaves nothing in the model, unless it makes what a lazy one lacks, or a sharded one gathers."""
    parameters = (p for m in open_modules(modules) for p in dict.values(m._parameters))
    lazy = any(p is not None and is_lazy(p) for p in parameters)
    if lazy or is_sharded(modules):
        yield
        return
    writes = writes_put_back(modules) if watched else nullcontext()
    with tables_kept(modules), certain(modules) if training else writes:
        yield


def _the_pass(call: object) -> str:
    """What was run, for people."""
    if not isinstance(call, Call):
        return "A forward pass"
    mode = " in train mode" if call.training else ""
    return f"A forward pass{mode}" if call.method == "forward" else f"A call of {call.method}{mode}"


@contextmanager
def _plain(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Whatever the caller is in: no inference mode, and no autocast, whose cached casts would hide the parameters."""
    kinds = {"cpu"} | {device.type for device in _devices(modules)} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _devices(modules: Sequence[nn.Module]) -> set[torch.device]:
    with unheard():
        return {p.device for m in modules for p in _values(m._parameters)}


def _values(table: Any) -> list[Tensor]:
    """The tensors of a table of a module, which is not Python's where that was scripted; nothing is lent for it."""
    values = dict.values(table) if isinstance(table, dict) else table.values()
    return [value for value in values if value is not None]


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        buffer.copy_(value)


@contextmanager
def _unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    flags = [(m, m.training) for m in modules]
    with unheard():
        held = {id(b): b for m in modules for b in _values(m._buffers)}
        buffers = [(b, b.detach().clone()) for b in held.values()]
        counted = tuple(b for b, _ in buffers if not b.is_inference())
    devices = sorted({device.index or 0 for device in _devices(modules) if device.type == "cuda"})
    # What was written is as before: a backward pass that is still to come need not know.
    kept = torch.autograd._unsafe_preserve_version_counter(counted)  # type: ignore[attr-defined]
    with kept, torch.random.fork_rng(devices=devices), random_states_kept():
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            with torch.no_grad():
                try:
                    _put_back(buffers)
                except BaseException:  # an interrupt: all is put back first
                    _put_back(buffers)
                    raise

"""One forward pass that leaves no trace in the model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracker.errors import StructureError

# A tuple is positional arguments, a dict keyword arguments, a tensor the one argument.
ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | Tensor


def forward_once(
    model: nn.Module,
    example_inputs: ExampleInputs | Arguments,
    within: AbstractContextManager[object] | None = None,
    *,
    heard: bool = False,
) -> object:
    """The model's output for `example_inputs`, in eval mode, without gradients, the call itself `within` a context.

    Training flags, buffers, and the random states of the devices are as before afterwards. No engine observes this
    pass, unless it is to be `heard`.

    Raises:
        StructureError: The forward pass failed.
    """
    args, kwargs = arguments(example_inputs)
    with _unchanged(model), _plain(model), torch.no_grad(), nullcontext() if heard else _probing():
        model.eval()
        try:
            with within or nullcontext():
                return model(*args, **kwargs)
        except Exception as error:
            raise StructureError(
                f"A forward pass of {type(model).__name__} with the example inputs failed "
                f"({type(error).__name__}: {error}). Pass example_inputs that the model accepts: a tuple of "
                "positional arguments, a dict of keyword arguments, or one tensor."
            ) from error


def is_probing() -> bool:
    """Whether the pass under way is one of ours, and no new data."""
    return _probes.get() > 0


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`; `memo` as of `copy.deepcopy`. Hooks that cannot be copied are shared.

    Raises:
        StructureError: The model cannot be copied.
    """
    memo = {} if memo is None else memo
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


def quiet_copy(model: nn.Module) -> nn.Module:
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
def uninterrupted() -> Iterator[None]:
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
def _probing() -> Iterator[None]:
    token = _probes.set(_probes.get() + 1)
    try:
        yield
    finally:
        _probes.reset(token)


class Arguments(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(example_inputs: ExampleInputs | Arguments) -> Arguments:
    """Example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, Arguments):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return Arguments((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        return Arguments(tuple(example_inputs), {})
    return Arguments((example_inputs,), {})


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Whatever the caller is in: no inference mode, and no autocast, whose cached casts would hide the parameters."""
    kinds = {"cpu"} | {p.device.type for p in model.parameters() if p.device.type != "meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

"""Tensors in what modules take and return, in whatever objects they lie: found, and replaced."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tracker.errors import StructureError

# Objects of these kinds lead to no tensors of a call: code, modules (their tensors are the model's), plain values.
_OPAQUE = (
    str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size, torch.Generator, torch.optim.Optimizer,
    nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    functools.partial,
)  # fmt: skip
_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size}
Change = Callable[[Tensor], Tensor]


def tensors_in(value: object) -> list[Tensor]:
    """Tensors of a nested value, in order, each object once.

    Followed are tuples, lists, mappings, dataclasses, attrs classes, packed sequences (their data), registered pytrees,
    and the attributes of any other object. Not followed are modules, and caches (objects of a class named so) that a
    model returns: what is in them only the model itself reads again.
    """
    if isinstance(value, Tensor):
        return [value]
    if not torch.compiler.is_compiling():
        found: list[Tensor] = []
        _collect(value, found, {})
        return found
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        value = list(value.values())
    # Compilers follow this far: no `tuple | list` (torch 2.9), no generator, no other objects.
    if not isinstance(value, (tuple, list)):
        return []
    found = []
    for part in value:
        found += tensors_in(part)
    return found


def first_floating(value: object) -> Tensor | None:
    """The tensor in which neurons are observed: of several the first floating one."""
    if type(value) is Tensor:
        return value if value.is_floating_point() else None
    for tensor in tensors_in(value):
        if tensor.is_floating_point():
            return tensor
    return None


def replaced(value: Any, change: Change) -> Any:
    """The same nested value with each of its tensors changed; what holds them is copied, the given one stays.

    In caches, too: those that a model is given. A tensor that lies in several places is changed once.
    """
    return _replaced(value, change, {})


def is_cache(value: object) -> bool:
    """Whether an object keeps what a model computed for its own next call (keys and values of attention, say)."""
    return any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


def _collect(value: object, found: list[Tensor], seen: dict[int, object]) -> None:
    kind = type(value)
    if isinstance(value, Tensor):
        found.append(value)
    elif kind in _PLAIN:
        return
    elif kind is tuple:
        for part in value:  # type: ignore[attr-defined]
            _collect(part, found, seen)
    elif id(value) not in seen and (kind is list or kind is dict or not is_cache(value)):
        seen[id(value)] = value  # kept alive: its id stays its own
        for part in _parts(value):
            _collect(part, found, seen)


def _parts(value: object) -> Iterable[object]:
    """What an object is made of; nothing, where that leads to no tensors of a call."""
    if isinstance(value, PackedSequence):
        return (value.data,)
    if isinstance(value, (tuple, list, deque)):
        return value
    if value is None or isinstance(value, _OPAQUE):
        return ()
    if isinstance(value, Mapping):
        return list(value.values())
    if (node := pytree.SUPPORTED_NODES.get(type(value))) is not None:
        return node.flatten_fn(value)[0]
    return [part for _, part in _attributes(value)]


def _attributes(value: object) -> list[tuple[str, object]]:
    """Names and values of an object's attributes: of its dictionary and of its slots."""
    slots = (
        name
        for kind in type(value).__mro__
        for name, member in vars(kind).items()
        if isinstance(member, types.MemberDescriptorType) and not name.startswith("__")
    )
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return list((found | getattr(value, "__dict__", {})).items())


def _replaced(value: Any, change: Change, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)][0]
    new: Any
    if isinstance(value, Tensor):
        new = change(value)
    elif not _leads_to_tensors(value):
        return value
    elif isinstance(value, PackedSequence):
        new = PackedSequence(_replaced(value.data, change, memo), *value[1:])
    elif isinstance(value, tuple):
        parts = [_replaced(part, change, memo) for part in value]
        if id(value) in memo:  # one of its parts holds it
            return memo[id(value)][0]
        new = value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    else:
        return _rebuilt(value, change, memo)
    memo[id(value)] = new, value  # kept alive: its id stays its own
    return new


def _rebuilt(value: Any, change: Change, memo: dict[int, Any]) -> Any:
    """A copy of what may hold itself: known before its parts are."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is not None and not isinstance(value, (list, dict, deque)):
        parts, context = node.flatten_fn(value)
        new = node.unflatten_fn([_replaced(part, change, memo) for part in parts], context)
        memo[id(value)] = new, value
        return new
    try:
        new = copy.copy(value)
    except Exception as error:
        raise StructureError(
            f"A {type(value).__name__} among the arguments cannot be copied ({type(error).__name__}: {error}), and the "
            "model is tried on copies in another dtype. Give its class a __copy__, or pass its tensors."
        ) from error
    memo[id(value)] = new, value
    if isinstance(value, (list, deque)):
        for i, part in enumerate(value):
            new[i] = _replaced(part, change, memo)
    elif isinstance(value, Mapping) and hasattr(new, "__setitem__"):
        for key, part in list(value.items()):
            new[key] = _replaced(part, change, memo)
    else:
        for name, part in _attributes(value):
            if _leads_to_tensors(part):
                object.__setattr__(new, name, _replaced(part, change, memo))  # frozen ones, too
    return new


def _leads_to_tensors(value: object) -> bool:
    seen: dict[int, object] = {}
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, Tensor):
            return True
        if id(part) not in seen:
            seen[id(part)] = part
            stack.extend(_parts(part))
    return False

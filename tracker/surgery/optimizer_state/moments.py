"""What an optimizer remembers of a parameter, moved by the same map as the parameter itself.

Fused optimizers do not check the shapes of their state: stale state is a silent wrong step or a crash. So everything
is either moved or reset, and a reset is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tracker.surgery.optimizer_state.slot_age import AGE, aged, head_start
from tracker.utils.slotmap import SlotMap

Slots = Mapping[int, SlotMap]

# Moments of the gradient, and of its square, as torch's optimizers name them.
FIRST = ("exp_avg", "momentum_buffer", "exp_inf", "grad_avg")
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


class StateChange(NamedTuple):
    """What happens to a parameter, as far as its optimizer has to know.

    gains: dimension → (old slots,) factors by which the gradients of these slots grow from now on.
    rewritten: Its kept values change: the direction in which they moved means nothing any more.
    made: Dimensions along which fresh slots are made, and not read.
    """

    slots: Slots
    gains: Mapping[int, Tensor] = {}
    rewritten: bool = False
    made: frozenset[int] = frozenset()


def moved(tensor: Tensor, slots: Slots) -> Tensor:
    """`tensor` with the slots of some dimensions moved; dtype, device and memory format as before."""
    result = tensor.detach()
    for dim, change in slots.items():
        result = change.take(result, fill=0, dim=dim)
    form = memory_format(tensor)
    return result.contiguous(memory_format=form) if slots else result.clone(memory_format=form)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """How a tensor lies in memory. With one channel both would do, and kernels round differently: the plain one."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def moved_state(
    optimizer: Optimizer, parameter: nn.Parameter, change: StateChange
) -> tuple[dict[str, Any] | None, str]:
    """The optimizer's state of a parameter after its slots moved, None for none; and what had to be reset, or "".

    State of the parameter's own shape moves with it, element by element. A factored second moment (Adafactor: sizes
    of 1 elsewhere) moves in the dimensions that it has. Numbers and steps stay. Where gradients will be r times as
    large, so are their moments (r² of the squares).

    The weights that make a fresh unit begin with the mean second moment of those that make the others, as far as it
    would have grown in a few steps. While a unit is hardly read, its gradients are small, and an optimizer that divides
    by their size alone would move it along noise as fast as the others along theirs, until it fires no more.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return None, ""
    fresh: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            fresh[key] = value
        elif value.ndim == 0:
            fresh[key] = value.clone()  # the old one is for undo, and steps count in place
        elif _follows(value, parameter):
            scaled = _scaled(key, value, change)
            slots = {d: s for d, s in change.slots.items() if value.shape[d] > 1}
            fresh[key] = moved(scaled, slots)
        else:
            return {}, f"{type(optimizer).__name__} state {key!r} of shape {tuple(value.shape)}"
    fresh.update(aged(optimizer, state, parameter, change.slots))
    second = [key for key in SECOND if isinstance(fresh.get(key), Tensor) and fresh[key].ndim]
    if any(bool(fresh[key].any()) for key in second):
        age, part = head_start(optimizer, parameter)
        for key in second:
            _inherit(fresh[key], change, part=part)
        if AGE in fresh:
            _inherit(fresh[AGE], change, most=age)
    return fresh, ""


def _inherit(
    value: Tensor, change: StateChange, *, part: float = 1.0, most: float = math.inf
) -> None:
    """Give fresh slots that are made this part of the mean of what the others have, `most` at most."""
    for dim in change.made & set(change.slots):
        source = change.slots[dim].source
        old, new = (
            torch.tensor(
                [i for i, s in enumerate(source) if (s is None) == fresh], device=value.device
            )
            for fresh in (False, True)
        )
        if len(old) and len(new) and value.shape[dim] == len(source):
            mean = value.index_select(dim, old).double().mean(dim, keepdim=True)
            mean = (part * mean).clamp(max=most).to(value.dtype)
            shape = [len(new) if d == dim else n for d, n in enumerate(value.shape)]
            value.index_copy_(dim, new, mean.expand(shape).contiguous())


def _scaled(key: str, value: Tensor, change: StateChange) -> Tensor:
    power = 1 if key in FIRST else 2 if key in SECOND else 0
    if not power or value.shape[0] == 1 < value.ndim:
        return value
    if change.rewritten and power == 1:
        return torch.zeros_like(value)
    for dim, gain in change.gains.items():
        shape = [-1 if d == dim else 1 for d in range(value.ndim)]
        if value.shape[dim] == len(gain):
            value = value * (gain**power).to(value).view(shape)
    return value


def is_flat(optimizer: Optimizer) -> bool:
    """LBFGS keeps one flat history over all parameters: it cannot be moved, only begun anew."""
    return isinstance(optimizer, LBFGS)


def unwrapped(optimizers: Sequence[Any]) -> list[Optimizer]:
    """The torch optimizers behind wrappers that keep theirs in `.optimizer`."""
    found = []
    for optimizer in optimizers:
        inner = optimizer
        while not isinstance(inner, Optimizer) or type(inner).__name__ == "AcceleratedOptimizer":
            inner = inner.optimizer
        found.append(inner)
    return found


def _follows(value: Tensor, parameter: nn.Parameter) -> bool:
    same = zip(value.shape, parameter.shape, strict=False)
    return value.ndim == parameter.ndim and all(a in (b, 1) for a, b in same)

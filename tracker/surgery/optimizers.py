"""What an optimizer remembers of a parameter, moved by the same map as the parameter itself.

Fused optimizers do not check the shapes of their state: stale state is a silent wrong step or a crash. So everything
is either moved or reset, and a reset is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tracker.slotmap import SlotMap

Slots = Mapping[int, SlotMap]


def moved(tensor: Tensor, slots: Slots) -> Tensor:
    """`tensor` with the slots of some dimensions moved; dtype, device and memory format as before."""
    result = tensor.detach()
    for dim, change in slots.items():
        result = change.take(result, fill=0, dim=dim)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.clone(memory_format=torch.channels_last)
    return result.clone(memory_format=torch.contiguous_format)


def moved_state(
    optimizer: Optimizer, parameter: nn.Parameter, slots: Slots
) -> tuple[dict[str, Any] | None, str]:
    """The optimizer's state of a parameter after its slots moved, None for none; and what had to be reset, or "".

    State of the parameter's own shape moves with it, element by element. A factored second moment (Adafactor: sizes
    of 1 elsewhere) moves in the dimensions that it has. Numbers and steps stay.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return None, ""
    fresh: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            fresh[key] = value
        elif _follows(value, parameter):
            fresh[key] = moved(value, {d: s for d, s in slots.items() if value.shape[d] > 1})
        else:
            return {}, f"{type(optimizer).__name__} state {key!r} of shape {tuple(value.shape)}"
    return fresh, ""


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

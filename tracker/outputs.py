"""Tensors in what modules take and return."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors_in(value: object) -> list[Tensor]:
    """Tensors of a (nested) tuple, list, dict or model output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        value = list(value.values())
    # Compilers follow this far: no `tuple | list` (torch 2.9), no generator.
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

"""Optimizers that nobody attached: their state does not move with a change, and fused kernels would not notice.

Memory beyond the end of a state's tensor would be read and written. So each optimizer's step is preceded by a look at
those of its parameters that a change resized. It costs a look-up a parameter, and only once something was resized.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from tracker.errors import SurgeryError

_resized = WeakTensorKeyDictionary()  # parameter → the shapes it had
_stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that took a step


def resized(parameter: Tensor, shape: torch.Size) -> None:
    """Remember that a parameter had another shape."""
    if not isinstance(parameter, nn.Parameter):
        return
    _resized.setdefault(parameter, set()).add(shape)


def unattached(parameters: Iterable[Tensor], attached: Iterable[Optimizer]) -> list[str]:
    """Kinds of the optimizers that keep a state of one of these parameters, and are not among those attached."""
    known, own = {id(o) for o in attached}, {id(p) for p in parameters}
    return [
        type(optimizer).__name__
        for optimizer in _stepped
        if id(optimizer) not in known and any(id(p) in own for p in optimizer.state)
    ]


def _refuse_stale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before each step of any optimizer.

    Raises:
        SurgeryError: Its state of a parameter is of a shape that the parameter had before a change.
    """
    if torch.compiler.is_compiling():
        return
    _stepped.add(optimizer)
    if not _resized:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shapes = _resized.get(parameter, ())
            if not shapes:
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                stale = isinstance(value, Tensor) and value.shape != parameter.shape
                if stale and value.shape in shapes:
                    raise SurgeryError(
                        f"This {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter "
                        f"that a change gave the shape {tuple(parameter.shape)}: it was not attached. No step was "
                        "taken. Call engine.attach_optimizer(optimizer) before changes; now begin its state anew, "
                        "optimizer.state.clear(), or take the change back, engine.undo()."
                    )


register_optimizer_step_pre_hook(_refuse_stale)

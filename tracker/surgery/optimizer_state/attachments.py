"""What changes with a model: the optimizers that hold its parameters, and copies of it. Checked before it is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tracker.errors import NotTrackedError, SurgeryError
from tracker.modules.layers import unwrap
from tracker.surgery.optimizer_state.moments import unwrapped


def torch_optimizer(given: Any) -> Optimizer:
    """The torch optimizer behind what was given, wrappers and all.

    Raises:
        SurgeryError: There is none.
    """
    try:
        return unwrapped([given])[0]
    except AttributeError:
        raise SurgeryError(
            f"A {type(given).__name__} is no optimizer. Attach a torch.optim.Optimizer, or a wrapper that keeps one in "
            "its attribute `optimizer`."
        ) from None


def holds(optimizer: Optimizer, models: Iterable[nn.Module]) -> bool:
    """Whether an optimizer holds a parameter of one of these models."""
    own = {id(p) for model in models for p in model.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def follower_of(model: nn.Module, given: Any) -> nn.Module:
    """The copy of `model` behind what was given: wrappers, and `torch.optim.swa_utils.AveragedModel`.

    Raises:
        SurgeryError: It is no copy of the model: no module, the model itself, or of other tensors.
    """
    inner = given.module if isinstance(given, torch.optim.swa_utils.AveragedModel) else given
    try:
        copied = unwrap(inner)
    except NotTrackedError as error:
        raise SurgeryError(f"A follower is a copy of the model. {error}") from None
    if copied is model:
        raise SurgeryError("The model cannot follow itself: a follower is a copy of it.")
    mine, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, copied))
    if mine != theirs:
        name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
        have, found = (_shape(m.get(name)) for m in (mine, theirs))
        raise SurgeryError(
            f"This {type(copied).__name__} is no copy of the model: {name} is {have} in the model, and {found} in it. "
            "Attach a copy that was made of the model as it is now, after track_model(model)."
        )
    return copied


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))

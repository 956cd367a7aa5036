"""What tests of surgery compare: everything that a change may touch, bit for bit; and faults to be injected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tracker import NeuronEngine

AGE = "slot_age"


def held(value: Any) -> Any:
    """A copy that later changes in place do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: held(v) for k, v in value.items()}
    return [held(v) for v in value] if isinstance(value, (list, tuple)) else value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict, as a copy."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def memory(model: nn.Module, optimizer: Optimizer, *, age: bool = True) -> dict[str, Any]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    return {
        name: {k: held(v) for k, v in optimizer.state[p].items() if age or k != AGE}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def everything(model: nn.Module, optimizer: Optimizer, engine: NeuronEngine) -> list[Any]:
    """All that a failed or undone change must leave as it was."""
    return [
        weights(model),
        {k: b.clone() for k, b in model.named_buffers()},
        {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        [id(p) for p in model.parameters()],
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
        memory(model, optimizer),
        len(optimizer.state),
        str(model),
        {k: list(v) for k, v in engine.track_model(model).items()},
        [len(m._forward_hooks) for m in model.modules()],
        [m.training for m in model.modules()],
    ]


def holds_the_live(model: nn.Module, optimizer: Optimizer) -> bool:
    """Every parameter of the model is in the optimizer once, and nothing else; all state fits its parameter."""
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    live = {id(p) for p in model.parameters()}
    fits = all(
        not isinstance(v, Tensor) or v.ndim == 0 or v.shape == p.shape
        for p, state in optimizer.state.items()
        for v in state.values()
    )
    return (
        len(grouped) == len(set(grouped))
        and set(grouped) == live
        and fits
        and {id(p) for p in optimizer.state} <= live
    )


def equal(a: Any, b: Any) -> bool:
    """Deep equality, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class FaultError(Exception):
    """Raised on purpose."""


class FaultAt(TorchDispatchMode):
    """Raise at the k-th ATen operation."""

    def __init__(self, k: int, error: type[BaseException] = FaultError) -> None:
        super().__init__()
        self.left, self.error = k, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return func(*args, **(kwargs or {}))

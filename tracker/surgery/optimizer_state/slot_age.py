"""The first steps of new slots: an optimizer of Adam's kind corrects the bias of their moments by their own age.

Torch keeps one step count for a whole parameter. Fresh moments of zero under an old count have no bias correction,
and move a new slot up to 6.5 times too far. So each slot's age is kept in the optimizer's state (it moves, saves and
loads with it), and after a step the displacement of young slots is scaled to what their own age allows:
√(1 − β₂ᵏ) / (1 − β₁ᵏ) at age k (Kingma & Ba, 2015, section 3), warmed up over the first steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.utils.slotmap import SlotMap

AGE = "slot_age"
GROWN_UP = 10_000  # steps after which nothing is corrected any more
WARM_UP = 100


def aged(
    optimizer: Optimizer, state: Mapping[str, Any], parameter: Tensor, slots: Mapping[int, SlotMap]
) -> dict[str, Any]:
    """State to add for a parameter of which some slots are fresh; nothing for optimizers without bias correction."""
    fresh = {dim: s for dim, s in slots.items() if None in s.source}
    if not fresh or "exp_avg" not in state or "betas" not in optimizer.defaults:
        return {}
    if isinstance(state.get(AGE), Tensor):
        return {}  # moves with the rest, fresh slots at zero
    shape = [slots[d].size if d in slots else n for d, n in enumerate(parameter.shape)]
    age = torch.full(shape, float(GROWN_UP), device=parameter.device)
    for dim, change in fresh.items():
        young = [i for i, s in enumerate(change.source) if s is None]
        age.index_fill_(dim, torch.tensor(young, device=age.device), 0.0)
    return {AGE: age}


def watch(optimizer: Optimizer) -> None:
    """Correct the steps of young slots from now on; once per optimizer."""
    if not any(isinstance(h, _Before) for h in optimizer._optimizer_step_pre_hooks.values()):
        before = _Before()
        optimizer.register_step_post_hook(_After(before))  # alone it does nothing
        optimizer.register_step_pre_hook(before)


class _Before:
    """Keeps the values of parameters with young slots, for the time of one step."""

    def __init__(self) -> None:
        self.values: dict[nn.Parameter, Tensor] = {}

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # Whether it gets a gradient is known later, where the step runs a closure.
                if AGE in optimizer.state.get(parameter, ()):
                    self.values[parameter] = parameter.detach().clone()


class _After:
    def __init__(self, before: _Before) -> None:
        self._before = before

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        values, self._before.values = self._before.values, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in values and parameter.grad is not None:
                    state = optimizer.state[parameter]
                    # Loading a state gives it the parameter's dtype, and bfloat16 cannot count beyond 256.
                    age = state[AGE] = _placed(state[AGE], parameter).float() + 1
                    factor = _correction(age, *group["betas"]).to(parameter.dtype)
                    old = values[parameter]
                    parameter.copy_(
                        torch.where(factor == 1, parameter, old + (parameter - old) * factor)
                    )
                    if bool((age >= GROWN_UP).all()):
                        del state[AGE]


def _placed(age: Tensor, parameter: Any) -> Tensor:
    """Ages of a parameter that was sharded since: sharded like it. Loading a state leaves them whole."""
    if not hasattr(parameter, "placements") or hasattr(age, "placements"):
        return age
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(age, parameter.device_mesh, parameter.placements)
    return placed


def _correction(age: Tensor, beta1: float, beta2: float) -> Tensor:
    factor = (1 - beta2**age).sqrt() / (1 - beta1**age) * (age / WARM_UP).clamp(max=1)
    return torch.where(age >= GROWN_UP, 1.0, factor)

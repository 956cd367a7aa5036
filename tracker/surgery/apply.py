"""The one place that writes to a model: all new values are computed first, then swapped in, under an undo log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import SurgeryError
from tracker.structure.trial import refit
from tracker.surgery.optimizers import Slots, is_flat, moved, moved_state
from tracker.surgery.plan import Plan

Step = Callable[[], None]


class UndoLog:
    """How to take back what was done, the last first."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Remember how to take back what is about to be done."""
        self._steps.append(step)

    def undo(self) -> None:
        """Take everything back."""
        with writable():
            while self._steps:
                self._steps.pop()()
        torch.clear_autocast_cache()


@contextmanager
def writable() -> Iterator[None]:
    """Parameters can be written inside, even when the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def require(plan: Plan, model: nn.Module) -> None:
    """Refuse what cannot be changed now.

    Raises:
        SurgeryError: The model changed since the plan was drawn, a backward pass is under way, or a tensor is of a kind
            that cannot be swapped in place.
    """
    if getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1:
        raise SurgeryError("A backward pass is under way. Change the model after optimizer.step().")
    tensors = model.state_dict(keep_vars=True)
    for name, shape in plan.shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise SurgeryError(
                f"The model was changed behind the engine's back: {name} was {tuple(shape)} and is {found}. Ask "
                "again: the structure is traced anew."
            )
    for name in plan.tensors:
        tensor = tensors[name]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized or tensor.is_meta:
            raise SurgeryError(
                f"{name} is a {type(tensor).__name__} ({tensor.dtype}, {tensor.device}): sharded, quantized and meta "
                "tensors cannot be changed in place."
            )


def apply(
    plan: Plan, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> tuple[UndoLog, list[str]]:
    """Carry out `plan` on the model and its followers; on any error everything is as it was.

    The `Parameter` objects stay: `set_` gives them new storage, so ties, hooks, groups of optimizers and graphs of
    earlier losses go on working.

    Returns:
        How to undo it, and what could not be moved and was reset.
    """
    notes: list[str] = []
    with writable():
        swaps = [swap for model in models for swap in _swaps(plan, model, optimizers, notes)]
    log = UndoLog()
    try:
        with writable():
            for swap in swaps:
                swap(log)
            for model in models:
                _refit_all(model, log)
        torch.clear_autocast_cache()
    except BaseException:
        log.undo()
        raise
    return log, notes


def _swaps(
    plan: Plan, model: nn.Module, optimizers: Sequence[Optimizer], notes: list[str]
) -> list[Callable[[UndoLog], None]]:
    tensors = model.state_dict(keep_vars=True)
    swaps: list[Callable[[UndoLog], None]] = []
    seen: set[int] = set()
    for name, slots in plan.tensors.items():
        tensor = tensors[name]
        if id(tensor) in seen:  # tied: the plan names it once more
            continue
        seen.add(id(tensor))
        gradient = None if tensor.grad is None else moved(tensor.grad, slots)
        swaps.append(_tensor_swap(tensor, moved(tensor, slots), gradient))
        for optimizer in optimizers:
            swaps += _state_swaps(optimizer, tensor, slots, notes)
    return swaps


def _tensor_swap(tensor: Tensor, new: Tensor, gradient: Tensor | None) -> Callable[[UndoLog], None]:
    def swap(log: UndoLog) -> None:
        old, old_gradient = tensor.detach(), tensor.grad

        def back() -> None:
            tensor.grad = None  # its shape must fit at every moment
            tensor.set_(old)  # type: ignore[call-overload]
            tensor.grad = old_gradient

        log.add(back)
        tensor.grad = None
        tensor.set_(new)  # type: ignore[call-overload]
        tensor.grad = gradient

    return swap


def _state_swaps(
    optimizer: Optimizer, tensor: Tensor, slots: Slots, notes: list[str]
) -> list[Callable[[UndoLog], None]]:
    if not any(p is tensor for group in optimizer.param_groups for p in group["params"]):
        return []
    if is_flat(optimizer):
        notes.append(f"{type(optimizer).__name__} was reset: its history is one flat vector")
        return [_state_swap(optimizer, p, None) for p in list(optimizer.state)] + [
            _attribute_swap(optimizer, "_numel_cache", None)
        ]
    fresh, lost = moved_state(optimizer, tensor, slots)  # type: ignore[arg-type]
    if lost:
        notes.append(f"reset, it could not be moved: {lost}")
    return [] if fresh is None else [_state_swap(optimizer, tensor, fresh)]


def _state_swap(
    optimizer: Optimizer, parameter: Tensor, fresh: dict[str, Any] | None
) -> Callable[[UndoLog], None]:
    def swap(log: UndoLog) -> None:
        old = optimizer.state[parameter]
        log.add(lambda: optimizer.state.__setitem__(parameter, old))
        if fresh is None:
            del optimizer.state[parameter]
        else:
            optimizer.state[parameter] = fresh

    return swap


def _attribute_swap(owner: object, name: str, value: object) -> Callable[[UndoLog], None]:
    def swap(log: UndoLog) -> None:
        old = getattr(owner, name, None)
        log.add(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    return swap


def _refit_all(model: nn.Module, log: UndoLog) -> None:
    """Sizes that modules keep beside their parameters."""
    for module in model.modules():
        before = _sizes(module)
        log.add(lambda m=module, values=before: m.__dict__.update(values))  # type: ignore[misc]
        refit(module)


def _sizes(module: nn.Module) -> Mapping[str, Any]:
    kinds = (int, tuple, list)
    return {
        k: v for k, v in vars(module).items() if isinstance(v, kinds) and not isinstance(v, bool)
    }

"""The one place that writes to a model: all new values are computed first, then swapped in, under an undo log."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import SurgeryError
from tracker.structure.code_sizes.attributes import sync_attributes, tensors
from tracker.structure.code_sizes.traced_int import missing_attributes
from tracker.surgery.inserted_modules import replace_module
from tracker.surgery.optimizer_state.moments import StateChange, is_flat, moved, moved_state
from tracker.surgery.optimizer_state.slot_age import watch
from tracker.surgery.plan import Plan, WeightUpdate
from tracker.surgery.undo import UndoLog, rewrite, writable


def require(plan: Plan, model: nn.Module) -> None:
    """Refuse what cannot be changed now.

    Raises:
        SurgeryError: The model changed since the plan was drawn, a backward pass is under way, or a tensor is of a kind
            that cannot be swapped in place.
    """
    if getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1:
        raise SurgeryError("A backward pass is under way. Change the model after optimizer.step().")
    held = tensors(model)
    for name, shape in plan.shapes.items():
        if name not in held or held[name].shape != shape:
            found = tuple(held[name].shape) if name in held else "missing"
            raise SurgeryError(
                f"The model was changed behind the engine's back: {name} was {tuple(shape)} and is {found}. Ask "
                "again: the structure is traced anew."
            )
    if lacking := missing_attributes(model, plan.attributes):
        raise SurgeryError(
            f"{type(model).__name__} has no {lacking[0]} in {lacking[0].module or 'the model'}, which has to change."
        )
    for name in plan.touched:
        tensor = held[name]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized or tensor.is_meta:
            raise SurgeryError(
                f"{name} is a {type(tensor).__name__} ({tensor.dtype}, {tensor.device}): sharded, quantized and meta "
                "tensors cannot be changed in place."
            )
        if tensor.is_inference():
            raise SurgeryError(
                f"{name} was made in inference mode and cannot be changed in place. Build the model outside of "
                "torch.inference_mode()."
            )


def apply(
    plan: Plan,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    *,
    keep: bool = False,
    precise: bool = False,
    log: UndoLog | None = None,
) -> tuple[UndoLog, list[str]]:
    """Carry out `plan` on the model and its followers; on any error everything is as it was.

    The `Parameter` objects stay: `set_` gives them new storage, so ties, hooks, groups of optimizers and graphs of
    earlier losses go on working.

    Args:
        plan: What to do.
        models: The model and its followers.
        optimizers: Those that hold parameters of the models.
        keep: The first model gets the plan's own modules, all others copies of them.
        precise: The models are light copies to try the plan on: what gets new values stays float64, unrounded.
        log: Where to note how to undo it; a new one, where there is none yet.

    Returns:
        How to undo it, and what could not be moved and was reset.
    """
    notes: list[str] = []
    with writable():
        swaps = [
            swap
            for model in models
            for swap in _swaps(plan, model, optimizers, notes, precise=precise)
        ]
    log = UndoLog() if log is None else log
    try:
        with writable():
            for swap in swaps:
                swap(log)
            for number, model in enumerate(models):
                for name, module in plan.modules.items():
                    own = module if number == 0 and keep else _copied(module, model)
                    replace_module(model, name, own, optimizers, log)
                sync_attributes(model, plan.attributes, log.add)
        torch.clear_autocast_cache()
        for optimizer in optimizers if plan.fresh else ():
            watch(optimizer)
    except BaseException:
        log.undo()
        raise
    return log, notes


def _swaps(
    plan: Plan,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    notes: list[str],
    *,
    precise: bool,
) -> list[Callable[[UndoLog], None]]:
    held = tensors(model)
    swaps: list[Callable[[UndoLog], None]] = []
    seen: set[int] = set()
    mixed = _mixed(plan, held)
    for name, slots in plan.touched.items():
        tensor = held[name]
        if id(tensor) in seen:  # tied: the plan names it once more
            continue
        seen.add(id(tensor))
        # One at a time: before they are cut, all together would be as large as the consumers are, in float64.
        new = moved(mixed[name]() if name in mixed else tensor, slots)
        unrounded = precise and new.is_floating_point() and (name in mixed or name in plan.fresh)
        new = new.double() if unrounded else new
        if name in plan.fresh:
            new += plan.fresh[name].to(new)
        if unrounded:
            swaps.append(partial(_reset, tensor, new))
            continue
        gradient = None if tensor.grad is None else moved(tensor.grad, slots)
        swaps.append(partial(rewrite, tensor, new.to(tensor.dtype), gradient))
        made = plan.made.get(name, frozenset())
        change = StateChange(slots, plan.gains.get(name, {}), name in plan.rewritten, made)
        for optimizer in optimizers:
            swaps += _state_swaps(optimizer, tensor, change, notes)
    return swaps


def _copied(module: nn.Module, model: nn.Module) -> nn.Module:
    """A module of a plan for another model than its own, which may be a copy in float64."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    own = copy.deepcopy(module)
    return own.double() if kinds == {torch.float64} else own


def _reset(tensor: Tensor, new: Tensor, log: UndoLog) -> None:
    """Give a parameter of a light copy content of another dtype."""
    old = tensor.data
    log.add(lambda: setattr(tensor, "data", old))
    tensor.data = new


def _mixed(plan: Plan, held: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Weights and biases of consumers that take something over, in float64, all their slots still there."""
    values: dict[str, Callable[[], Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for mix in plan.mixes:
        if mix.tensor not in plan.rewritten and mix.bias not in plan.rewritten:
            continue
        values[mix.tensor] = partial(_weight, held[mix.tensor], mix)
        if mix.bias is not None:
            source = mix.columns(held[mix.tensor].detach())[..., list(mix.source)].double()
            across = mix.across - (mix.across > mix.dim) if mix.kernel_positions == 1 else 0
            shift = (source @ mix.shift.to(source.device)).movedim(across, 0)
            shift = shift.reshape(len(shift), -1).sum(1)
            biases[mix.bias] = biases.get(mix.bias, held[mix.bias].detach().double()) + shift
    return {**values, **{name: partial(Tensor.clone, bias) for name, bias in biases.items()}}


def _weight(tensor: Tensor, mix: WeightUpdate) -> Tensor:
    old = tensor.detach()
    weight = mix.columns(old.double()).clone()
    if mix.target:
        source = weight[..., list(mix.source)]
        weight[..., list(mix.target)] += source @ mix.matrix.to(weight.device)
    return mix.weight(weight, old.shape)


def _state_swaps(
    optimizer: Optimizer, tensor: Tensor, change: StateChange, notes: list[str]
) -> list[Callable[[UndoLog], None]]:
    if not any(p is tensor for group in optimizer.param_groups for p in group["params"]):
        return []
    if is_flat(optimizer):
        notes.append(f"{type(optimizer).__name__} was reset: its history is one flat vector")
        return [_state_swap(optimizer, p, None) for p in list(optimizer.state)] + [
            _attribute_swap(optimizer, "_numel_cache", None)
        ]
    fresh, lost = moved_state(optimizer, tensor, change)  # type: ignore[arg-type]
    if lost:
        notes.append(f"reset, it could not be moved: {lost}")
    return [
        _no_state(optimizer, tensor) if fresh is None else _state_swap(optimizer, tensor, fresh)
    ]


def _no_state(optimizer: Optimizer, parameter: Tensor) -> Callable[[UndoLog], None]:
    """The optimizer knows nothing of a parameter: what it will know fits only the changed one."""

    def swap(log: UndoLog) -> None:
        log.add(lambda: optimizer.state.pop(parameter, None))
        log.before.states.setdefault((id(optimizer), id(parameter)), (optimizer, parameter, {}))

    return swap


def _state_swap(
    optimizer: Optimizer, parameter: Tensor, fresh: dict[str, Any] | None
) -> Callable[[UndoLog], None]:
    def swap(log: UndoLog) -> None:
        old = optimizer.state[parameter]
        log.add(lambda: optimizer.state.__setitem__(parameter, old))
        log.before.states.setdefault((id(optimizer), id(parameter)), (optimizer, parameter, old))
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

"""Removal from beginning to end: check, try on a copy, apply, verify, record; or nothing at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tracker.errors import SurgeryError, VerificationError
from tracker.probe import Arguments, arguments, forward_once
from tracker.structure.trial import (
    TOLERANCE,
    difference_from_mask,
    double,
    relative_difference,
    removed,
    vivid,
)
from tracker.surgery.apply import UndoLog, apply, require
from tracker.surgery.optimizers import unwrapped
from tracker.surgery.plan import Plan, plan_removal
from tracker.surgery.receipt import Receipt
from tracker.tracker import ActivationTracker, unwrap


@torch.inference_mode(False)  # copies made inside the caller's inference mode could not be written
def remove_units(
    tracker: ActivationTracker,
    units: Mapping[str, Sequence[int]],
    optimizers: Sequence[Any] = (),
    followers: Sequence[nn.Module] = (),
    *,
    dry_run: bool = False,
    verify: bool = True,
) -> tuple[Receipt, UndoLog | None]:
    """Remove units ({group name: unit indices}) of the current model; its consumers see zero in their place.

    Raises:
        SurgeryError: Refused; nothing was touched.
        VerificationError: The result was not what the plan promises; everything is as before.
    """
    entry = tracker.current
    model, observer = entry.model(), entry.observer
    if observer.training is not None:
        raise SurgeryError(
            "A forward pass is under way. Change the model between steps, after optimizer.step()."
        )
    structure = tracker.structure()
    sizes = {name: len(layer.ids) for name, layer in entry.layers.items()}
    plan = plan_removal(model, structure, units, sizes)
    copies = [_follower(f) for f in followers]
    for each in (model, *copies):
        require(plan, each)
    assert observer.inputs is not None  # the structure was traced with them
    inputs = arguments(Arguments(*observer.inputs))
    with observer.paused():
        difference = _promised(plan, model, inputs) if verify else None
        expected, flops = _preview(plan, model, inputs)
        before = _count(model)
        receipt = Receipt(
            operation="prune_units",
            promise=plan.promise,
            output_difference=difference,
            units=plan.units,
            removed_ids=list(plan.removed_ids),
            added_ids=[],
            parameters_before=before,
            parameters_after=before - _lost(plan, model),
            flops_before=_flops(model, inputs)[1],
            flops_after=flops,
            dry_run=dry_run,
        )
        if dry_run:
            return receipt, None
        log, notes = apply(plan, [model, *copies], unwrapped(optimizers))
        try:
            why = f"removed by prune_units (group {', '.join(plan.units)})"
            log.add(tracker.reslot(plan.layers, why))
            old, entry.structure = entry.structure, None
            log.add(lambda: setattr(entry, "structure", old))
            if verify:
                _as_expected(model, inputs, expected)
        except BaseException:
            log.undo()
            raise
    receipt.notes.extend(dict.fromkeys(notes))
    return receipt, log


def _promised(plan: Plan, model: nn.Module, inputs: Arguments) -> float | None:
    """The difference of a copy without the units from the masked one, in float64; checked against the promise."""
    bench = vivid(copy.deepcopy(model).double())
    exact = double(inputs)
    try:
        with removed(bench, plan.choice):
            found = forward_once(bench, exact)
    except Exception as error:
        raise VerificationError(
            f"Refused: without the units the model does not run ({error.__cause__ or error}). Nothing was touched."
        ) from error
    if plan.promise == "changed":
        return None
    difference = difference_from_mask(bench, exact, plan.choice, found)
    if difference > TOLERANCE:
        raise VerificationError(
            f"Refused: without the units the output differs from the masked model's by {difference:.1e}, and "
            f"{TOLERANCE:.0e} is allowed. Something in the model's code depends on the number of units. Nothing was "
            "touched."
        )
    return difference


def _preview(plan: Plan, model: nn.Module, inputs: Arguments) -> tuple[object, int]:
    """Output and FLOPs of a copy without the units, in the model's own dtype."""
    bench = copy.deepcopy(model)
    with removed(bench, plan.choice):
        return _flops(bench, inputs)


def _as_expected(model: nn.Module, inputs: Arguments, expected: object) -> None:
    """The changed model gives what the copy gave: the swap itself went right."""
    difference = relative_difference(forward_once(model, inputs), expected)
    allowed = max(
        100 * torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()
    )
    if difference > allowed:
        raise VerificationError(
            f"After the change the output differed by {difference:.1e} from that of the copy it was tried on. "
            "Everything was undone."
        )


def _flops(model: nn.Module, inputs: Arguments) -> tuple[object, int]:
    counter = FlopCounterMode(display=False)
    output = forward_once(model, inputs, within=counter)
    return output, counter.get_total_flops()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _lost(plan: Plan, model: nn.Module) -> int:
    lost = 0
    for name, parameter in model.named_parameters():
        kept = 1
        for dim, n in enumerate(parameter.shape):
            slots = plan.tensors.get(name, {}).get(dim)
            kept *= n if slots is None else slots.size
        lost += parameter.numel() - kept
    return lost


def _follower(model: nn.Module) -> nn.Module:
    """The module that follows the tracked one, behind wrappers and `torch.optim.swa_utils.AveragedModel`."""
    inner = model.module if isinstance(model, torch.optim.swa_utils.AveragedModel) else model
    return unwrap(inner)

"""A change from beginning to end: check, try on a copy, apply, verify, record; or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tracker.errors import StructureError, SurgeryError, VerificationError
from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import forward_once, gc_paused, is_running
from tracker.observation.neuron_ids import reason_to_leave
from tracker.structure import Structure
from tracker.structure.adapters.registry import adapt
from tracker.structure.trace import Passes, plain_kernels
from tracker.structure.trials.float64_mode import Precision
from tracker.structure.trials.op_stream import Stream, differing
from tracker.structure.trials.temporary_copies import (
    InFloat64,
    copy_sharing_storage,
    is_finite,
    randomize_constants,
    relative_difference,
    temporary_copy,
)
from tracker.structure.trials.trial import shuffled
from tracker.surgery.apply import apply, require
from tracker.surgery.loss_change import LossForecast
from tracker.surgery.optimizer_state.attachments import follower_of
from tracker.surgery.optimizer_state.moments import unwrapped
from tracker.surgery.plan import Plan
from tracker.surgery.prices.flops import flops
from tracker.surgery.receipt import Receipt
from tracker.surgery.undo import UndoLog
from tracker.tracker import ActivationTracker, TrackedModel
from tracker.utils.nested import tensors_in

# Outputs that a change leaves as they were may differ by the rounding of the rewritten weights.
EXACT = 1e-6
# After the swap: roundings of the changed copy, and the share of the largest output that none of them may pass.
ROUNDINGS, LOOSEST = 4, 0.1


@gc_paused()
@torch.inference_mode(False)  # copies made inside the caller's inference mode could not be written
def execute(
    tracker: ActivationTracker,
    plan: Plan,
    optimizers: Sequence[Any] = (),
    followers: Sequence[nn.Module] = (),
    *,
    dry_run: bool = False,
    verify: bool = True,
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    log: UndoLog | None = None,
) -> tuple[Receipt, UndoLog | None]:
    """Carry out a plan on the current model, its optimizers and its followers.

    How to take it back is noted in `log`: whoever passes one can do so even where this returns nothing any more.

    Raises:
        SurgeryError: Refused; nothing was touched.
        VerificationError: The result was not what the plan promises; everything is as before.
    """
    entry = tracker.current
    model, observer = entry.model(), entry.observer
    copies = [follower_of(model, f) for f in followers]
    for each in (model, *copies):
        require(plan, each)
    with observer.paused():
        passes = tracker.passes()
        first, *others = passes.recorded
        if verify and plan.only_removes:
            tracker.structure()
        traced = entry.structure
        precision = Precision() if traced is None else traced.precision
        promise, difference = (
            _check_preserved(plan, model, passes, traced if plan.only_removes else None, precision)
            if verify
            else (plan.promise, None)
        )
        flops_before = flops(model, first)[1] if traced is None else traced.flops
        gaps = [] if traced is None else traced.gaps
        with temporary_copy(model) as trial_copy:
            apply(plan, [trial_copy], [])
            output, flops_after = flops(trial_copy, first)
            parameters_after = count(trial_copy)
            if verify and not dry_run:
                with plain_kernels():
                    outputs = [output, *(forward_once(trial_copy, call) for call in others)]
                pairs = zip(passes.recorded, outputs, strict=True)
                expected = [_expected(trial_copy, call, plain) for call, plain in pairs]
        receipt = Receipt(
            operation=plan.operation,
            promise=promise,
            output_difference=difference,
            units=plan.units,
            removed_ids=list(plan.removed_ids),
            added_ids=[],
            parameters_before=count(model),
            parameters_after=parameters_after,
            flops_before=flops_before,
            flops_after=flops_after,
            notes=[*notes, *gaps, *_said(precision if verify else Precision())],
            skipped=list(skipped),
            dry_run=dry_run,
            kinds={group.name: group.kind for group, units in plan.choice if units},
            widths=_widths(plan, entry),
            modules=list(plan.modules),
            samples=_samples(entry),
            **asdict(plan.outlook or LossForecast()),
        )
        if dry_run:
            return receipt, None
        log = UndoLog() if log is None else log
        try:
            _, lost = apply(plan, [model, *copies], unwrapped(optimizers), keep=True, log=log)
            why = reason_to_leave(plan.operation, list(plan.units))
            receipt.added_ids.extend(tracker.remap(plan.layers, plan.tensors, why, log.add))
            if plan.modules:
                log.add_last(tracker.rehook())
                added, removed = tracker.sync_layers(why, log.add)
                receipt.added_ids.extend(added)
                receipt.removed_ids.extend(removed)
            if verify:
                for call, (output, allowed) in zip(passes.recorded, expected, strict=True):
                    _as_expected(model, call, output, allowed)
            receipt.notes.extend(dict.fromkeys(lost))
            return receipt, log
        except BaseException:
            log.undo()
            raise


def refuse_inside_a_pass(tracker: ActivationTracker) -> None:
    """Refuse a change while the model runs.

    Raises:
        SurgeryError: A forward pass is under way.
    """
    if is_running(tracker.current.model()):
        raise SurgeryError(
            "A forward pass is under way. Change the model between steps, after optimizer.step()."
        )


def unchanged(operation: str, entry: TrackedModel) -> Receipt:
    """The receipt of an operation that leaves all sizes and ids as they are, and changes the outputs."""
    model, calls = entry.model(), entry.observer.calls
    size = count(model)
    work = 0
    if entry.structure is not None:
        work = entry.structure.flops
    elif calls:
        work = flops(model, calls[0])[1]
    samples = _samples(entry)
    return Receipt(operation, "changed", None, {}, [], [], size, size, work, work, samples=samples)


def _widths(plan: Plan, entry: TrackedModel) -> dict[str, list[int]]:
    """Neurons [before, after] of layers that become wider or narrower, and make units of their own."""
    structure = entry.structure
    groups = [] if structure is None else structure.groups
    made = {layer for group in groups for layer in group.layers}
    pairs = {n: [len(entry.layers[n].ids), len(slots.source)] for n, slots in plan.layers.items()}
    return {n: p for n, p in pairs.items() if p[0] != p[1] and (n in made or not made)}


def _samples(entry: TrackedModel) -> int | None:
    """How many samples the example inputs have."""
    observer = entry.observer
    first = next((t for call in observer.calls for t in tensors_in((call.args, call.kwargs))), None)
    if first is None or first.ndim <= observer.batch_dim:
        return None
    return first.shape[observer.batch_dim] or None


class OutputSnapshot:
    """The current model's output on the example inputs, to compare with later."""

    def __init__(self, tracker: ActivationTracker) -> None:
        self._tracker = tracker
        self._calls = [call.modes()[0] for call in tracker.current.observer.calls]
        self._before = self._outputs()

    def difference(self) -> float:
        """How far the outputs are from what they were, in float64, relative to the largest value."""
        return relative_difference(self._outputs(), self._before)

    def _outputs(self) -> list[object]:
        entry = self._tracker.current
        in_float64 = entry.structure is None or entry.structure.precision.in_float64
        with entry.observer.paused(), plain_kernels(), torch.inference_mode(False):
            copied = InFloat64(copy_sharing_storage(entry.model()), in_float64)
            return [copied.run(call) for call in self._calls]


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def _check_preserved(
    plan: Plan,
    model: nn.Module,
    passes: Passes,
    structure: Structure | None,
    precision: Precision,
) -> tuple[str, float | None]:
    """What holds of a changed copy in float64, and how far its output is from what was promised.

    "exact" of a plan is what the observations say; if the example inputs say otherwise, the answer is "changed".
    """
    with temporary_copy(model) as whole:
        if plan.promise == "masked":  # whatever the values: constant norms could hide an error
            randomize_constants(whole)
        for module in whole.modules() if structure is not None else ():
            adapt(module)  # as the changed copy's attention may be: operations are compared
        with temporary_copy(whole) as trial_copy:
            return _run_trial(plan, whole, trial_copy, passes, structure, precision)


def _run_trial(
    plan: Plan,
    whole: nn.Module,
    trial_copy: nn.Module,
    passes: Passes,
    structure: Structure | None,
    precision: Precision,
) -> tuple[str, float | None]:
    """Make every call of a changed copy, and of the original."""
    apply(plan, [trial_copy], [], precise=precision.in_float64)
    changed, original = (InFloat64(copied, precision.in_float64) for copied in (trial_copy, whole))
    masked, tolerance = plan.promise == "masked", precision.tolerance
    differences: list[tuple[Call, float]] = []
    for number, call in enumerate((*passes.recorded, *passes.alike)):
        found, after = _made(changed, call)
        before = Stream(original.model)
        with plain_kernels():
            if masked:
                difference = original.difference_from_mask(
                    call, plan.choice, found, before, tolerance=tolerance
                )
            else:
                expected = original.run(call, before)
                if not is_finite(expected):
                    raise SurgeryError(
                        f"Refused: the model's output on the example inputs is not finite ({call}): nothing can be "
                        "compared. Look for NaN in its weights and in the inputs. Nothing was touched."
                    )
                difference = relative_difference(found, expected)
        recorded = number < len(passes.recorded)
        if structure is not None and recorded:
            same = masked and difference <= tolerance
            _same_operations(
                differing(before, after, structure.forecast, plan.choice, same=same, number=number)
            )
        if masked and recorded and difference <= tolerance:
            others = _difference_on_others(original, changed, call, plan, tolerance)
            difference = max(difference, others)
        if masked and difference > tolerance:
            raise VerificationError(
                f"Refused: without the units the output of {call} differs from the masked model's by "
                f"{difference:.1e}, and {tolerance:.0e} is allowed. Something in the model's code depends on the "
                "number of units. Nothing was touched."
            )
        differences.append((call, difference))
    if masked:
        return "masked", max(difference for _, difference in differences)
    return _verified_promise(
        plan, differences, max(EXACT, 0 if precision.in_float64 else tolerance)
    )


def _made(changed: InFloat64, call: Call) -> tuple[object, Stream]:
    after = Stream(changed.model)
    try:
        with plain_kernels():
            return changed.run(call, within=after), after
    except Exception as error:
        raise VerificationError(
            f"Refused: a changed copy of the model does not run {call} ({error.__cause__ or error}). Nothing was "
            "touched."
        ) from error


def _same_operations(why: str) -> None:
    if why:
        raise VerificationError(
            f"Refused: without the units the model's operations are not those of before: {why}. Nothing was touched."
        )


def _verified_promise(
    plan: Plan, differences: Sequence[tuple[Call, float]], tolerance: float
) -> tuple[str, float]:
    """The promise that holds of a change that masks nothing, by how far its outputs are from the original's.

    What was seen in eval mode decides; in train mode a batch norm that was measured anew shows other values.
    """
    for call, difference in differences:
        if difference == float("inf"):
            raise VerificationError(
                f"Refused: the output of {call} of a changed copy has another shape, or is not finite. Nothing was "
                "touched."
            )
    preserving = plan.operation in PRESERVING
    counted = [d for call, d in differences if preserving or not call.training]
    difference = max(counted or [d for _, d in differences])
    promise = "exact" if plan.promise == "exact" and difference <= tolerance else "changed"
    if plan.promise == "exact" and promise != "exact" and preserving:
        raise VerificationError(
            f"Refused: {plan.operation} must preserve the function, and a changed copy differs by "
            f"{difference:.1e}. Nothing was touched."
        )
    return promise, difference


def _difference_on_others(
    original: InFloat64, changed: InFloat64, call: Call, plan: Plan, tolerance: float
) -> float:
    """How far a changed copy is from the masked original on other inputs than the example, if these can be run."""
    others = shuffled(call)
    with plain_kernels():
        try:
            found = changed.run(others)
            if is_finite(found):
                return original.difference_from_mask(
                    others, plan.choice, found, tolerance=tolerance
                )
        except StructureError:
            pass
        try:  # not any values will do
            return float("inf") if is_finite(original.run(others)) else 0.0
        except StructureError:
            return 0.0


PRESERVING = ("expand_layer", "insert_layer")


def _said(precision: Precision) -> list[str]:
    return [] if precision.in_float64 else [f"compared {precision}"]


def _expected(trial_copy: nn.Module, call: Call, plain: object) -> tuple[object, float]:
    """The changed copy's output with the kernels that the user runs, and how far the changed model's may be from it.

    As far as rounding goes in this very model: how far plain kernels' output, `plain`, is from the users' kernels'.
    """
    try:
        found = forward_once(trial_copy, call)
    except StructureError as error:
        raise VerificationError(
            f"Refused: a changed copy of the model does not run {call} ({error.__cause__ or error}). Nothing was "
            "touched."
        ) from error
    floating = [p.dtype for p in trial_copy.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    rounding = min(ROUNDINGS * relative_difference(plain, found), LOOSEST)
    return found, max(rounding, 10 * eps, min(100 * eps, 0.1 * LOOSEST))


def _as_expected(model: nn.Module, call: Call, expected: object, allowed: float) -> None:
    """The changed model gives what the copy gave: the swap itself went right."""
    try:
        found = forward_once(model, call, watch_writes=True)
    except StructureError as error:
        raise VerificationError(
            f"After the change the model does not run ({error.__cause__ or error}). Everything was undone."
        ) from error
    difference = relative_difference(found, expected)
    if difference > allowed:
        raise VerificationError(
            f"After the change the output of {call} differed by {difference:.1e} from that of the copy it was tried "
            f"on, and by rounding it may by {allowed:.1e}. Everything was undone."
        )

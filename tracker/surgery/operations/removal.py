"""Removal of units in place: with zero in their place, or with their part taken over by what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracker.surgery.loss_change import LossForecast
from tracker.surgery.operations.compensate import compute_compensation
from tracker.surgery.plan import Plan, plan_removal
from tracker.tracker import ActivationTracker


def plan_pruning(
    tracker: ActivationTracker, units: Mapping[str, Sequence[int]], compensate: bool
) -> tuple[Plan, list[str]]:
    """The plan that removes units ({group name: unit indices}) of the current model.

    Their consumers see zero in their place or, with `compensate`, take over what the other units explain of them.

    Raises:
        SurgeryError: A group is unknown, cannot be pruned, or would lose its last unit; the message says why.
    """
    entry = tracker.current
    structure = tracker.structure()
    sizes = {name: len(layer.ids) for name, layer in entry.layers.items()}
    plan = plan_removal(entry.model(), structure, units, sizes)
    if not compensate:
        return plan, []
    takeover = compute_compensation(tracker, plan)
    promise = "exact" if takeover.exact else "changed"
    return replace(
        plan,
        mixes=takeover.mixes,
        gains=takeover.gains,
        promise=promise,
        outlook=LossForecast(takeover.loss_change),
    ), takeover.notes

"""From what a policy wants to one change of the model, within what is to be left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracker.errors import SurgeryError
from tracker.surgery import Receipt
from tracker.surgery.prices.protection import Protect, Protection, protects
from tracker.tracker import ActivationTracker
from tracker.training.candidates import grown, neurons_of
from tracker.training.choices import Requests
from tracker.training.seen import CollectedSignals

if TYPE_CHECKING:
    from tracker.parts.surgeon import Surgeon


@dataclass(frozen=True, slots=True)
class Limits:
    """What is left alone.

    Attributes:
        protect: As the policy says it.
        protected: The same, in groups and units.
        spared: With the units that came lately: they may neither go nor get a new start.
    """

    protect: Protect
    protected: Protection
    spared: Protection


def carry_out(
    wanted: Requests,
    surgeon: Surgeon,
    tracker: ActivationTracker,
    limits: Limits,
    seen: CollectedSignals,
    seed: int,
) -> Receipt:
    """Make the first of the changes that are wanted; what is left alone is not among it.

    Args:
        wanted: By the policy.
        surgeon: Makes it.
        tracker: Of the model.
        limits: What is left alone.
        seen: In the look.
        seed: Of new weights.

    Raises:
        SurgeryError: Nothing of it may be done; the model is as it was.
    """
    groups = {g.name: g for g in surgeon.structure.groups}
    named = {*wanted.remove, *wanted.merge, *wanted.recycle, *wanted.expand}
    if named - groups.keys():
        raise SurgeryError(f"There is no group {sorted(named - groups.keys())[0]!r}.")
    limits.protected.refuse(surgeon.structure, {}, wanted.expand)
    limits.spared.refuse(surgeon.structure, wanted.recycle, ())
    if wanted.remove:
        units, _ = limits.spared.allowed(surgeon.structure, wanted.remove)
        return surgeon.prune_units(units, compensate=True)
    if wanted.insert:
        return surgeon.insert_layer(wanted.insert[0])
    if wanted.drop:
        if protects(tracker, limits.protect, wanted.drop[0]):
            raise SurgeryError(f"{wanted.drop[0]!r} is protected: it is not removed.")
        return surgeon.remove_layer(wanted.drop[0], batches=seen.inputs)
    if wanted.merge:
        drops = {name: [d for _, d in folded] for name, folded in wanted.merge.items()}
        able, _ = limits.spared.allowed(surgeon.structure, drops)
        pairs = [
            ids
            for name, folded in wanted.merge.items()
            for keep, drop in folded
            if drop in able.get(name, ())
            for ids in zip(
                neurons_of(tracker, groups[name], keep),
                neurons_of(tracker, groups[name], drop),
                strict=True,
            )
        ]
        return surgeon.merge_neurons(pairs)
    if wanted.recycle:
        ids = [
            i for g, units in wanted.recycle.items() for u in units for i in groups[g].neuron_ids(u)
        ]
        return surgeon.recycle_neurons(ids, seed=seed)
    growth = {}
    for name, number in wanted.expand.items():
        layer, own = grown(tracker, groups[name])
        growth[layer] = number * own
    return surgeon.expand_layers(growth, seed=seed, directions=seen.directions(growth))

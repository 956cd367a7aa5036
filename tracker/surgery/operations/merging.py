"""Merging: the part of one neuron is folded into another, by the affine map that fits best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tracker.compensation.linear import SPARE
from tracker.errors import SurgeryError
from tracker.statistics import Covariance
from tracker.surgery.calibration.consumers import consumers, reads_of
from tracker.surgery.operations.compensate import gains
from tracker.surgery.operations.least_squares import ENOUGH
from tracker.surgery.plan import Plan, WeightUpdate, plan_removal, units_of
from tracker.tracker import ActivationTracker

# Share of a neuron's variance that may stay unexplained where a merge is called exact.
ROUNDING = 1e-10


def plan_merge(
    tracker: ActivationTracker, pairs: Sequence[tuple[tuple[str, int], tuple[str, int]]]
) -> tuple[Plan, list[str]]:
    """The plan that folds the second neuron of each pair, given as (layer, local index), into the first.

    A consumer sees a·keep + c in the place of drop: a = cov(keep, drop) / var(keep), c = mean(drop) − a·mean(keep);
    without a bias to hold c, a·keep with a = E[keep·drop] / E[keep²].

    Raises:
        SurgeryError: A pair is not of one group of units, or a neuron is dropped twice.
    """
    entry = tracker.current
    model, structure = entry.model(), tracker.structure()
    kept_by: dict[tuple[str, int], tuple[str, int]] = {}
    for keep, drop in pairs:
        if keep == drop:
            raise SurgeryError(
                f"Neuron {drop[1]} of layer {drop[0]!r} cannot be folded into itself."
            )
        if drop in kept_by:
            raise SurgeryError(f"Neuron {drop[1]} of layer {drop[0]!r} cannot be dropped twice.")
        kept_by[drop] = keep
    units = units_of(structure, list(kept_by))
    sizes = {name: len(layer.ids) for name, layer in entry.layers.items()}
    plan = plan_removal(model, structure, units, sizes)
    where = {
        neuron: (group.name, unit)
        for group, _ in plan.choice
        for unit in range(group.size)
        for neuron in group.neurons(unit)
    }
    target: dict[tuple[str, int], int] = {}  # (group, unit that goes) → unit that stays
    for drop in kept_by:
        keep, chain = kept_by[drop], {drop}
        while keep in kept_by:  # folded on into what stays
            if keep in chain:
                raise SurgeryError(f"The pairs go round in a circle at neuron {keep[1]}.")
            chain.add(keep)
            keep = kept_by[keep]
        if keep not in where or where[keep][0] != where[drop][0]:
            raise SurgeryError(
                f"Neurons {keep[1]} of {keep[0]!r} and {drop[1]} of {drop[0]!r} are not read alike: they are no "
                "units of one group."
            )
        target[where[drop]] = where[keep][1]
    able, problems = consumers(model, [group for group, _ in plan.choice])
    reads = reads_of(tracker, able)
    mixes, exact, few = [], not problems, list[str]()
    for one in able:
        covariance = reads[one.weight].of_features()
        if int(covariance.count.max()) < ENOUGH * len(covariance.mean):
            few.append(one.module)
        exact = exact and int(covariance.count.max()) >= SPARE
        source: list[int] = []
        into: list[int] = []
        for group, gone in plan.choice:
            place = (one.weight, one.reads)
            if place in group.roles:
                for unit in gone:
                    source += group.members[unit][place]
                    into += group.members[target[group.name, unit]][place]
        stay = sorted(set(into))
        matrix = torch.zeros((len(source), len(stay)), dtype=torch.float64)
        shift = torch.zeros(len(source), dtype=torch.float64)
        for row, (drop_, keep_) in enumerate(zip(source, into, strict=True)):
            slope, offset, lost = _best(covariance, keep_, drop_, one.bias is not None)
            matrix[row, stay.index(keep_)] = slope
            shift[row] = offset
            exact = exact and lost <= ROUNDING
        scale = covariance.comoment.diagonal() / covariance.count.max() + covariance.mean.square()
        exact = exact and one.passes_on(shift, scale[source].to(shift))
        mixes.append(
            WeightUpdate(
                one.weight,
                one.reads,
                one.makes,
                tuple(source),
                tuple(stay),
                matrix,
                one.bias,
                shift,
            )
        )
    exact = exact and all(group.exact for group, _ in plan.choice)
    merged = replace(
        plan,
        operation="merge_neurons",
        mixes=tuple(mixes),
        gains=gains(model, plan.choice, mixes),
        promise="exact" if exact else "changed",
    )
    notes = [f"not folded: {problem}" for problem in problems]
    if few:
        notes.append(
            f"folded from few observations ({', '.join(few[:4])}): call calibrate(batches) first"
        )
    return merged, notes


def _best(covariance: Covariance, keep: int, drop: int, affine: bool) -> tuple[float, float, float]:
    """Slope and offset of the best map, and the share of drop's variance that it leaves unexplained.

    Where no bias could hold an offset it is 0, and second moments take the place of variances.
    """
    comoment, mean = covariance.comoment, covariance.mean
    at = torch.tensor([keep, drop])
    moments = comoment[at[:, None], at].double()
    if not affine:
        moments = torch.addr(moments, mean[at], mean[at], alpha=int(covariance.count.max()))
    of_keep, both, of_drop = (float(moments[i]) for i in ((0, 0), (0, 1), (1, 1)))
    slope = both / of_keep if of_keep > 0 else 0.0
    lost = (of_drop - slope * both) / of_drop if of_drop > 0 else 0.0
    offset = float(mean[drop]) - slope * float(mean[keep]) if affine else 0.0
    return slope, offset, max(lost, 0.0)

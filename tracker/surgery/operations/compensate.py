"""What stays takes over what goes: consumers' weights and biases, in least squares over what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracker.compensation import compensate
from tracker.compensation.linear import second_moment
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.structure import UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery.calibration.consumers import Consumer, consumers, reads_of
from tracker.surgery.calibration.curvature import in_loss
from tracker.surgery.operations.least_squares import ENOUGH
from tracker.surgery.plan import Plan, WeightUpdate
from tracker.tracker import ActivationTracker

Choice = Sequence[tuple[UnitGroup, Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Compensation:
    """How the consumers of what goes are to change."""

    mixes: tuple[WeightUpdate, ...]
    gains: dict[str, dict[int, Tensor]]
    exact: bool  # all that goes is explained up to rounding, as far as was observed
    loss_change: float | None = (
        None  # predicted, over all consumers; None where a curvature is not known
    )
    notes: list[str] = field(default_factory=list)


def compute_compensation(tracker: ActivationTracker, plan: Plan) -> Compensation:
    """The best that the consumers of the units that go can do with the others, for each consumer by itself."""
    model = tracker.current.model()
    able, problems = consumers(model, [group for group, _ in plan.choice])
    reads = reads_of(tracker, able)
    held = tensors(model)
    mixes, exact, few = [], not problems, []
    rise: float | None = None if problems else 0.0
    for one in able:
        read = reads.get(one.weight)
        gone = columns(plan.choice, one)
        if read is None or not one.fits(read, held[one.weight]):
            problems.append(f"{one.module} was not seen to read anything")
            exact, rise = False, None
            continue
        mix, whole = solve(one, read, held[one.weight], gone)
        mixes.append(mix)
        exact = exact and whole
        rise = (
            None if rise is None or read.loss is None else rise + loss_change(one, read, held, mix)
        )
        if int(read.covariance.count.max()) < ENOUGH * len(read.covariance.mean):
            few.append(one.module)
    notes = [f"not compensated: {problem}" for problem in problems]
    if few:
        notes.append(
            f"compensated from few observations ({', '.join(few[:4])}): call calibrate(batches) first"
        )
    exact = exact and all(group.exact for group, _ in plan.choice)
    return Compensation(tuple(mixes), gains(model, plan.choice, mixes), exact, rise, notes)


def loss_change(
    one: Consumer, read: ConsumerInput, held: Mapping[str, Tensor], mix: WeightUpdate
) -> float:
    """Predicted change of the loss by what a consumer computes with a mix, first order and second.

    Its weight changes by ΔW on centred inputs: ⟨∇W, ΔW⟩ + ½ tr(ΔW C ΔWᵀ E[Σ g gᵀ]). See `curvature`.
    """
    assert read.loss is not None
    weight, c = one.matrix(held[one.weight], read.kernel_positions), read.covariance
    lost, change = weight[:, list(mix.source)], torch.zeros_like(weight)
    change[:, list(mix.target)], change[:, list(mix.source)] = lost @ mix.matrix, -lost
    covariance = c.comoment / max(int(c.count.max()), 1)
    if one.bias is None:
        covariance = second_moment(covariance, c.mean)
    error = in_loss(change, read.loss.curvature)
    rise = float(((error @ covariance) * error).sum())
    slope = read.loss.slope
    return rise + (
        float((slope.double() * change).sum()) if slope is not None and slope.numel() else 0.0
    )


def columns(choice: Choice, one: Consumer) -> tuple[int, ...]:
    """The input features of a consumer that go."""
    gone: set[int] = set()
    for group, units in choice:
        for unit in units:
            gone.update(group.members[unit].get((one.weight, one.reads), ()))
    return tuple(sorted(gone))


def solve(
    one: Consumer, read: ConsumerInput, weight: Tensor, gone: Sequence[int]
) -> tuple[WeightUpdate, bool]:
    """The mix by which a consumer's other columns take over those that go, and whether nothing is lost."""
    covariance, gone = read.covariance, read.columns(gone)
    lost = set(gone)
    kept = [i for i in range(len(covariance.mean)) if i not in lost]
    count = int(covariance.count.max())
    found = compensate(
        covariance.comoment / max(count, 1),
        covariance.mean,
        one.matrix(weight, read.kernel_positions),
        None if one.bias is None else torch.zeros(weight.numel() // len(covariance.mean)),
        kept,
        count=count,
    )
    mix = WeightUpdate(
        one.weight,
        one.reads,
        one.makes,
        tuple(gone),
        tuple(kept),
        found.mixing,
        one.bias,
        found.shift,
        read.kernel_positions,
    )
    scale = covariance.comoment.diagonal() / max(count, 1) + covariance.mean.square()
    return mix, found.exact and one.passes_on(found.shift, scale[list(gone)])


def gains(
    model: nn.Module, choice: Choice, mixes: Sequence[WeightUpdate]
) -> dict[str, dict[int, Tensor]]:
    """For what makes the kept units: how much stronger their consumers read them from now on.

    ‖W'‖ / ‖W‖ of a unit's columns, over all its consumers. Gradients of the makers grow alike, and so must the
    optimizer's moments.
    """
    held = tensors(model)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for mix in mixes:
        weight = mix.columns(held[mix.tensor].detach().double().cpu()).flatten(0, -2)
        new = weight.clone()
        new[:, list(mix.target)] += weight[:, list(mix.source)] @ mix.matrix
        for norms, values in ((before, weight), (after, new)):
            norms[mix.tensor] = (
                values.square().sum(0).unflatten(0, (-1, mix.kernel_positions)).sum(1)
            )
    found: dict[str, dict[int, Tensor]] = {}
    for group, gone in choice:
        places = [p for p, role in group.roles.items() if role == "reads" and p[0] in before]
        if not places:
            continue
        ratio = torch.ones(group.size, dtype=torch.float64)
        for unit in set(range(group.size)) - set(gone):
            old = sum(float(before[t][list(group.members[unit][t, d])].sum()) for t, d in places)
            new_ = sum(float(after[t][list(group.members[unit][t, d])].sum()) for t, d in places)
            ratio[unit] = (new_ / old) ** 0.5 if old > 0 and new_ > 0 else 1.0
        for place, role in group.roles.items():
            if role == "reads":
                continue
            tensor, dim = place
            factors = found.setdefault(tensor, {}).setdefault(
                dim, torch.ones(held[tensor].shape[dim], dtype=torch.float64)
            )
            for unit, members in enumerate(group.members):
                factors[list(members[place])] = ratio[unit]
    return found

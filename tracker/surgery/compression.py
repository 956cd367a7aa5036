"""Compression: one budget over all groups, spent where the consumers lose least, their weights taking over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tracker.compensation import Path, allocate, backward, select
from tracker.compensation.criteria import Criterion
from tracker.compensation.linear import second_moment
from tracker.errors import SurgeryError
from tracker.probe import Arguments
from tracker.reads import Read
from tracker.structure import UnitGroup
from tracker.structure.integers import UnsolvableError
from tracker.structure.lending import borrowed
from tracker.structure.sizes import tensors
from tracker.structure.units import Place
from tracker.surgery.apply import apply
from tracker.surgery.calibration import Consumer, consumers, reads_of
from tracker.surgery.evidence import RECONSTRUCTION, check_criterion, ordered
from tracker.surgery.flops import flops, flops_by_weight
from tracker.surgery.plan import Plan
from tracker.surgery.removal import plan_pruning
from tracker.tracker import ActivationTracker

OF = ("parameters", "flops", "neurons")
WITHIN = 0.02  # of the whole
PRECISE = 0.003  # tried for, as long as another attempt comes nearer


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compression must respect.

    round_to: Widths are to be multiples of it. floor: Units that must stay in each group (int), or in some ({name: n}).
    inexact: Whether groups may shrink that a norm or softmax runs over (the residual stream); not compensated.
    """

    round_to: int = 1
    floor: int | Mapping[str, int] = 1
    inexact: bool = False

    def of(self, group: UnitGroup) -> int:
        """Units of a group that must stay."""
        return self.floor if isinstance(self.floor, int) else self.floor.get(group.name, 1)


@dataclass(frozen=True, slots=True)
class Problem:
    """What the units of one group do for the consumers: columns of one covariance, and weights that read them."""

    covariance: Tensor
    weight: Tensor
    mean: Tensor | None
    units: list[list[int]]
    protected: list[int]
    count: int
    consumers: int  # that read differently: blocks of the covariance

    @property
    def total(self) -> float:
        """What the outputs of the consumers vary by, summed over them; positive."""
        w = self.weight.double()
        return max(float(((w @ self.covariance) * w).sum()), 1e-300)


def plan_compression(
    tracker: ActivationTracker,
    keep: float,
    of: str,
    limits: Limits,
    *,
    criterion: str | Criterion = RECONSTRUCTION,
    compensate: bool = True,
    progress: bool = False,
) -> tuple[Plan, list[str]]:
    """The plan that keeps the share `keep` of the model's parameters, FLOPs, or prunable units.

    criterion: In which order units go; how many of each group, their reconstruction error always says.

    Raises:
        SurgeryError: It cannot be met to within 2%; the message says why.
    """
    if of not in OF:
        raise SurgeryError(f"compress keeps a share of one of {', '.join(OF)}, not of {of!r}.")
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise SurgeryError(f"keep is a share between 0 and 1, not {keep!r}.")
    check_criterion(criterion)
    entry = tracker.current
    model = entry.model()
    groups, problems, left_out = problems_of(tracker, limits)
    if not groups:
        raise SurgeryError(
            "There is nothing to compress: no group can be pruned whose consumers were seen to read. "
            + "; ".join(left_out[:3])
        )
    held, chosen = tensors(model), criterion != RECONSTRUCTION
    bar = tqdm(problems, desc="Weighing units", unit="group", disable=not progress, leave=False)
    found = [
        ordered(held, g, p, criterion)
        if chosen
        else backward(p.covariance, p.weight, p.units, p.protected, count=p.count, mean=p.mean)
        for g, p in zip(groups, bar, strict=True)
    ]
    paths = []
    for group, selection in zip(groups, found, strict=True):
        most = min(len(selection.order), group.size - max(limits.of(group), 1))
        errors = (selection.errors[:most] / max(selection.total, 1e-300)).tolist()
        step = math.lcm(limits.round_to, group.multiple_of)
        paths.append(Path(group.size, errors, round_to=step, floor=limits.of(group)))
    inputs = Arguments(*entry.observer.inputs)  # type: ignore[misc]
    cost = _cost(model, groups, of, inputs)
    whole = cost([0] * len(groups))
    target = budget = keep * whole
    best: tuple[float, dict[str, list[int]]] | None = None
    for _ in range(6):
        kept = allocate(paths, cost, budget, within=1.0)
        removed = [g.size - k for g, k in zip(groups, kept, strict=True)]
        removed = _nearer(removed, paths, [s.exact for s in found], cost, budget)
        units = {
            g.name: sorted(found[i].order[:n])
            if chosen
            else chosen_units(problems, i, g, n, found[i].order)
            for i, (g, n) in enumerate(zip(groups, removed, strict=True))
            if n
        }
        achieved = _achieved(tracker, units, inputs, of, cost(removed))
        error = abs(achieved - target) / whole
        if best is None or error < best[0]:
            best = error, units
        if error <= PRECISE:
            break
        nearer = budget * target / achieved  # what the estimate of costs did not see
        if abs(nearer - budget) < 1e-4 * target:
            break
        budget = nearer
    assert best is not None
    if best[0] > WITHIN:
        raise SurgeryError(
            f"Of the {of}, {keep:.1%} cannot be kept: with the floors, and as widths change in steps, the nearest "
            f"is off by {best[0]:.1%} of the whole. Lower `round_to` or the floors, or ask for another share."
        )
    plan, notes = plan_pruning(tracker, best[1], compensate)
    return replace(plan, operation="compress"), [*notes, *left_out]


def _nearer(
    removed: list[int],
    paths: Sequence[Path],
    free: Sequence[int],
    cost: Callable[[list[int]], float],
    budget: float,
) -> list[int]:
    """The last steps, in one group or two, that bring the cost nearest to the budget: small models need them."""
    # What costs nothing does not come back.
    stops = [
        [n for n in path.stops() if n >= min(least, now)]
        for path, least, now in zip(paths, free, removed, strict=True)
    ]

    def neighbours(now: list[int]) -> list[list[int]]:
        found = []
        few = range(len(now)) if len(now) <= 12 else ()
        for g in range(len(now)):
            at = stops[g].index(now[g])
            for i in range(max(at - 2, 0), min(at + 3, len(stops[g]))):
                one = [*now[:g], stops[g][i], *now[g + 1 :]]
                found.append(one)
                for h in few:
                    place = stops[h].index(one[h])
                    reach = range(max(place - 2, 0), min(place + 3, len(stops[h])))
                    found += [[*one[:h], stops[h][j], *one[h + 1 :]] for j in reach]
        return found

    def merit(now: list[int]) -> tuple[float, float]:
        error = sum(path.errors[n - 1] for path, n in zip(paths, now, strict=True) if n)
        return max(abs(cost(now) - budget), PRECISE * budget), error

    best = merit(removed)
    while best[0] > PRECISE * budget:
        nearest = min(neighbours(removed), key=merit)
        if merit(nearest) >= best:
            break
        removed, best = nearest, merit(nearest)
    return removed


Part = tuple[list[Consumer], Read]  # consumers that read the same, and what they read


class Problems(Sequence[Problem]):
    """The problems of several groups, each made when it is asked for: together they would fill the memory."""

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup], parts: Sequence[list[Part]]):
        self._held, self._groups, self._parts = tensors(model), groups, parts

    def __len__(self) -> int:
        return len(self._groups)

    def columns(self, index: int) -> int:
        """How many columns a problem has, without making it."""
        return sum(len(read.covariance.mean) for _, read in self._parts[index])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError("one problem at a time")
        return _problem(self._held, self._groups[index], self._parts[index])


def problems_of(
    tracker: ActivationTracker, limits: Limits, *, example: bool = True
) -> tuple[list[UnitGroup], Problems, list[str]]:
    """Groups that can shrink by themselves, what their consumers read, and what was left out with the reason.

    example: Whether the example inputs will do for what was not observed.
    """
    entry, structure = tracker.current, tracker.structure()
    model = entry.model()
    left_out: list[str] = []
    ready: list[UnitGroup] = []
    taken: dict[Place, set[int]] = {}
    # Of heads and their dimensions, which lie at the same indices, heads. What is concatenated lies beside each other.
    for group in sorted(structure.groups, key=lambda g: -len(next(iter(g.members[0].values())))):
        lies = {p: {i for unit in group.members for i in unit[p]} for p in group.roles}
        if not group.prunable or not (group.exact or limits.inexact):
            continue
        if group.size % group.multiple_of:
            left_out.append(f"{group.name}: {group.size} units, {group.multiple_of} at a time")
            continue
        if any(taken.get(place, set()) & indices for place, indices in lies.items()):
            continue
        try:
            structure.integers.solve([(group, list(range(group.multiple_of)))])
        except UnsolvableError as error:
            left_out.append(f"{group.name}: {error}")
            continue
        for place, indices in lies.items():
            taken.setdefault(place, set()).update(indices)
        ready.append(group)
    order = {group.name: i for i, group in enumerate(structure.groups)}
    ready.sort(key=lambda g: order[g.name])
    wanted, _ = consumers(model, ready)
    reads = reads_of(tracker, wanted, example=example)
    groups: list[UnitGroup] = []
    parts: list[list[Part]] = []
    for group in ready:
        found = _parts(model, group, reads)
        if found:
            groups.append(group)
            parts.append(found)
        else:
            left_out.append(f"{group.name}: what reads it was not observed")
    return groups, Problems(model, groups, parts), left_out


def _parts(model: nn.Module, group: UnitGroup, reads: Mapping[str, Read]) -> list[Part]:
    """The consumers of a group; none if one was not observed."""
    able, _ = consumers(model, [group])
    held, unit = tensors(model), group.members[0]
    parts: list[Part] = []
    for one in able:
        read = reads.get(one.weight)
        if read is None or not one.fits(read, held[one.weight]):
            return []
        for together, known in parts:
            other = together[0]
            same = other.reads == one.reads and _same_input(known, read, other, one)
            if same and unit[other.weight, other.reads] == unit[one.weight, one.reads]:
                together.append(one)
                break
        else:
            parts.append(([one], read))
    return parts


def _problem(held: Mapping[str, Tensor], group: UnitGroup, parts: Sequence[Part]) -> Problem:
    """The consumers of a group side by side; those that read the same are one."""
    blocks, weights, means = [], [], []
    units: list[list[int]] = [[] for _ in range(group.size)]
    offset, count = 0, 2**62
    for together, read in parts:
        one, c = together[0], read.covariance
        weight = torch.cat([each.matrix(held[each.weight], read.taps) for each in together])
        n = int(c.count.max())
        covariance = c.comoment / max(n, 1)
        scale = 1.0
        if one.bias is None:
            covariance = second_moment(covariance, c.mean)
        if len(parts) > 1:  # each consumer's loss counts relative to what it puts out
            scale = float(((weight @ covariance) * weight).sum()) ** -0.5 if weight.any() else 1.0
        blocks.append(covariance)
        weights.append(weight * scale)
        means.append(c.mean if one.bias is not None else torch.full_like(c.mean, 0.0))
        for unit, members in enumerate(group.members):
            units[unit] += [offset + i for i in read.columns(members[one.weight, one.reads])]
        offset += len(c.mean)
        count = min(count, n)
    used = {i for unit in units for i in unit}
    rest = [[i] for i in range(offset) if i not in used]
    return Problem(
        blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks),
        weights[0] if len(weights) == 1 else torch.block_diag(*weights),
        torch.cat(means),
        units + rest,
        list(range(len(units), len(units) + len(rest))),
        count,
        len(parts),
    )


def _same_input(a: Read, b: Read, one: Consumer, other: Consumer) -> bool:
    x, y = a.covariance, b.covariance
    return (
        (one.bias is None) == (other.bias is None)
        and x.mean.shape == y.mean.shape
        and (x is y or (torch.equal(x.mean, y.mean) and torch.equal(x.comoment, y.comoment)))
    )


def chosen_units(
    problems: Sequence[Problem],
    index: int,
    group: UnitGroup,
    remove: int,
    order: Sequence[int] | None = None,
) -> list[int]:
    """The units that go: the first of `order` or, where few stay or none is given, as a second look says."""
    if order is None or group.size - remove <= 0.15 * group.size:
        problem = problems[index]
        found = select(
            problem.covariance,
            problem.weight,
            problem.units,
            remove,
            problem.protected,
            count=problem.count,
            mean=problem.mean,
        )
        order = found.order
    return sorted(order[:remove])


def _cost(
    model: nn.Module, groups: Sequence[UnitGroup], of: str, inputs: Arguments
) -> Callable[[list[int]], float]:
    """Removed units per group → cost; FLOPs as far as weights make them, the rest as it is."""
    if of == "neurons":
        total = sum(g.size for g in groups)
        return lambda removed: float(total - sum(removed))
    weights, fixed = flops_by_weight(model, inputs) if of == "flops" else _sizes(model)
    held = tensors(model)
    tables = []
    for name, price in weights.items():
        lost = [
            (dim, held[name].shape[dim], g, len(group.members[0][name, dim]))
            for g, group in enumerate(groups)
            for dim in range(held[name].ndim)
            if (name, dim) in group.roles
        ]
        if lost:
            tables.append((price, lost))
        else:
            fixed += price

    def cost(removed: list[int]) -> float:
        total = fixed
        for price, lost in tables:
            gone: dict[int, float] = {}
            for dim, size, g, each in lost:
                gone[dim] = gone.get(dim, 0.0) + removed[g] * each / size
            total += price * math.prod(1 - share for share in gone.values())
        return total

    return cost


def _sizes(model: nn.Module) -> tuple[dict[str, float], float]:
    return {name: float(p.numel()) for name, p in model.named_parameters()}, 0.0


def _achieved(
    tracker: ActivationTracker,
    units: Mapping[str, Sequence[int]],
    inputs: Arguments,
    of: str,
    estimate: float,
) -> float:
    if of != "flops":
        return estimate
    plan, _ = plan_pruning(tracker, units, compensate=False)
    with borrowed(tracker.current.model()) as bench:
        apply(plan, [bench], [])
        return float(flops(bench, inputs)[1])

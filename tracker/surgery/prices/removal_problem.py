"""What the units of each group do for the consumers that read them: what a removal is chosen and priced by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tracker.compensation import Selection, backward, select, slope_along
from tracker.compensation.linear import constant, default_ridge, second_moment
from tracker.errors import SurgeryError
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.structure import UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.code_sizes.size_equations import UnsolvableError
from tracker.structure.units import Place
from tracker.surgery.calibration.consumers import Consumer, consumers, reads_of
from tracker.surgery.calibration.curvature import in_loss
from tracker.surgery.prices.protection import NOTHING, Protect, Protection, matching, protection
from tracker.tracker import ActivationTracker


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compression must respect.

    round_to: Widths are to be multiples of it. floor: Units that must stay in each group (int), or in some ({name: n}).
    inexact: Whether groups may shrink that a norm or softmax runs over (the residual stream); not compensated.
    protected: What is left alone.
    """

    round_to: int = 1
    floor: int | Mapping[str, int] = 1
    inexact: bool = False
    protected: Protection = NOTHING

    def of(self, group: UnitGroup) -> int:
        """Units of a group that must stay."""
        own = self.floor if isinstance(self.floor, int) else self.floor.get(group.name, 1)
        return max(own, self.protected.floor(group))


def limits_of(
    tracker: ActivationTracker,
    round_to: int,
    floor: int | Mapping[str, int],
    protect: Protect,
    sizes: Mapping[str, int],
    *,
    inexact: bool,
) -> Limits:
    """The limits that a user sets; of a floor, groups by name or pattern, as `protection` matches them.

    sizes: Units of each group that shares are of.

    Raises:
        SurgeryError: A name matches nothing, or a number is none.
    """
    numbers = [round_to, *(floor.values() if isinstance(floor, Mapping) else [floor])]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise SurgeryError(
            f"round_to and floors are numbers of units, 1 or more, not {round_to!r} and {floor!r}."
        )
    if isinstance(floor, Mapping):
        own: dict[str, int] = {}
        for pattern, units in floor.items():
            for group in matching(tracker, pattern):
                own[group.name] = max(own.get(group.name, 1), units)
        floor = own
    return Limits(round_to, floor, inexact, protection(tracker, protect, sizes))


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
    priced: bool = False  # squares of what the consumers put out are rises of the loss
    cross: Tensor | None = (
        None  # slopeᵀ · weight of the consumers, (n, n): the loss's first-order part, if priced
    )

    @property
    def total(self) -> float:
        """What the outputs of the consumers vary by, summed over them; positive."""
        w = self.weight.double()
        return max(float(((w @ self.covariance) * w).sum()), 1e-300)

    def backward(self, remove: int | None = None, limit: float = float("inf")) -> Selection:
        """Greedy elimination of its units; errors are in the loss where it is priced. See `compensation.backward`."""
        return backward(
            self.covariance,
            self.weight,
            self.units,
            self.protected,
            remove,
            count=self.count,
            mean=self.mean,
            limit=limit,
        )

    def rise(self, selection: Selection) -> Tensor:
        """Predicted rise of the loss along a selection, first order and second: (len(order),). Only if priced."""
        if self.cross is None or not selection.order:
            return selection.errors
        ridge = default_ridge(self.count, len(self.covariance))
        order = selection.order
        return selection.errors + slope_along(
            self.covariance, self.cross, self.units, order, ridge=ridge
        )


Part = tuple[
    list[Consumer], list[ConsumerInput]
]  # consumers that read the same, and what each reads


class Problems(Sequence[Problem]):
    """The problems of several groups, each made when it is asked for: together they would fill the memory."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        parts: Sequence[list[Part]],
        protected: Protection,
    ):
        self._held, self._groups, self._parts = tensors(model), groups, parts
        self._protected = protected

    def __len__(self) -> int:
        return len(self._groups)

    def columns(self, index: int) -> int:
        """How many columns a problem has, without making it."""
        return sum(len(reads[0].covariance.mean) for _, reads in self._parts[index])

    @property
    def priced(self) -> bool:
        """Whether the curvature of the loss is known at all consumers of all groups."""
        return all(r.loss is not None for parts in self._parts for _, reads in parts for r in reads)

    def constant(self, index: int) -> list[int]:
        """Units of a group of which every consumer reads a constant."""
        members = self._groups[index].members
        found = set(range(len(members)))
        for together, reads in self._parts[index]:
            one, c = together[0], reads[0].covariance
            covariance = c.comoment / max(int(c.count.max()), 1)
            bare = one.bias is None  # a constant that nothing can take over is no constant
            seen = second_moment(covariance, c.mean) if bare else covariance
            still = constant(seen, None if bare else c.mean).tolist()
            place = one.weight, one.reads
            found = {u for u in found if all(still[i] for i in reads[0].columns(members[u][place]))}
        return sorted(found)

    def plain(self, index: int) -> Problem:
        """The same problem with what the consumers put out as it is, and not in the loss."""
        return self._problem(index, plain=True)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError("one problem at a time")
        return self._problem(index, plain=False)

    def _problem(self, index: int, *, plain: bool) -> Problem:
        group = self._groups[index]
        found = _problem(self._held, group, self._parts[index], plain=plain)
        pinned = self._protected.pinned_of(group)
        return replace(found, protected=[*sorted(pinned), *found.protected]) if pinned else found


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
        if limits.protected.covers(group):
            left_out.append(f"{group.name}: protected")
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
    return groups, Problems(model, groups, parts, limits.protected), left_out


def _parts(model: nn.Module, group: UnitGroup, reads: Mapping[str, ConsumerInput]) -> list[Part]:
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
            same = other.reads == one.reads and _same_input(known[0], read, other, one)
            if same and unit[other.weight, other.reads] == unit[one.weight, one.reads]:
                together.append(one)
                known.append(read)
                break
        else:
            parts.append(([one], [read]))
    return parts


def _problem(
    held: Mapping[str, Tensor], group: UnitGroup, parts: Sequence[Part], *, plain: bool = False
) -> Problem:
    """The consumers of a group side by side; those that read the same are one.

    Where the curvature of the loss is known at all of them, their outputs are in units of the loss's square root.
    """
    blocks, weights, means = [], [], []
    units: list[list[int]] = [[] for _ in range(group.size)]
    offset, count = 0, 2**62
    priced = not plain and all(read.loss is not None for _, reads in parts for read in reads)
    crosses: list[Tensor] = []
    for together, reads in parts:
        one, read, c = together[0], reads[0], reads[0].covariance
        rows = [each.matrix(held[each.weight], read.kernel_positions) for each in together]
        if priced:
            crosses += _cross(rows, reads)
            rows = [
                in_loss(w, r.loss.curvature) for w, r in zip(rows, reads, strict=True) if r.loss
            ]
        weight = torch.cat(rows)
        n = int(c.count.max())
        covariance = c.comoment / max(n, 1)
        scale = 1.0
        if one.bias is None:
            covariance = second_moment(covariance, c.mean)
        if (
            len(parts) > 1 and not priced
        ):  # each consumer's loss counts relative to what it puts out
            power = float(((weight @ covariance) * weight).sum())
            scale = power**-0.5 if power > 0 else 1.0  # one that saw no variance loses nothing
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
        priced,
        torch.block_diag(*crosses) if priced and len(crosses) == len(parts) else None,
    )


def _cross(weights: Sequence[Tensor], reads: Sequence[ConsumerInput]) -> list[Tensor]:
    """slopeᵀ · weight over consumers that read the same; none where a slope is unknown or all are zero."""
    slopes = [read.loss.slope for read in reads if read.loss is not None]
    if not all(s is not None and s.numel() for s in slopes):
        return []
    pairs = zip(slopes, weights, strict=True)
    return [torch.stack([s.double().T @ w for s, w in pairs if s is not None]).sum(0)]


def _same_input(a: ConsumerInput, b: ConsumerInput, one: Consumer, other: Consumer) -> bool:
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

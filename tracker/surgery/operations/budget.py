"""What is left of a model once units go, and the shares of its groups that meet a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from tracker.compensation import ErrorCurve
from tracker.inputs.calls import Arguments
from tracker.structure import UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery.apply import apply
from tracker.surgery.operations.removal import plan_pruning
from tracker.surgery.prices.flops import flops, flops_by_weight
from tracker.tracker import ActivationTracker

OF = ("parameters", "flops", "neurons")
WITHIN = 0.02  # of the whole
PRECISE = 0.003  # tried for, as long as another attempt comes nearer
Cost = Callable[[list[int]], float]  # of removed units per group


def spread(
    shares: Sequence[float],
    paths: Sequence[ErrorCurve],
    free: Sequence[int],
    cost: Cost,
    budget: float,
) -> list[int]:
    """Removed units per group, in the proportions of `shares` of each group's units, that bring the cost to the budget.

    free: Units of each group whose removal costs nothing; they go in any case.
    """
    stops = [path.stops() for path in paths]

    def at(scale: float) -> list[int]:
        wanted = [
            max(least, scale * share * path.units)
            for share, path, least in zip(shares, paths, free, strict=True)
        ]
        return [_nearest(s, w) for s, w in zip(stops, wanted, strict=True)]

    low, high = 0.0, 1.0 / max(min((s for s in shares if s > 0), default=1.0), 1e-9)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) > budget else (low, middle)
    return nearer(
        min((at(low), at(high)), key=lambda r: abs(cost(r) - budget)), paths, free, cost, budget
    )


def _nearest(stops: Sequence[int], wanted: float) -> int:
    return min(stops, key=lambda n: abs(n - wanted))


def below(removed: list[int], paths: Sequence[ErrorCurve], cost: Cost, budget: float) -> list[int]:
    """The same, and the fewest steps more that bring the cost to the budget or under it, where there are such."""
    removed = list(removed)
    while cost(removed) > budget * (1 + 1e-9):
        able = []
        for g, path in enumerate(paths):
            more = next((n for n in path.stops() if n > removed[g]), None)
            if more is not None:
                trial = [*removed[:g], more, *removed[g + 1 :]]
                under = cost(trial) <= budget * (1 + 1e-9)
                able.append((not under, -cost(trial) if under else cost(trial), trial))
        if not able:
            break
        removed = min(able)[2]
    return removed


def nearer(
    removed: list[int],
    paths: Sequence[ErrorCurve],
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


def cost_of(
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


def achieved(
    tracker: ActivationTracker,
    units: Mapping[str, Sequence[int]],
    inputs: Arguments,
    of: str,
    estimate: float,
) -> float:
    """The cost of what stays without these units; FLOPs are counted on a copy."""
    if of != "flops":
        return estimate
    plan, _ = plan_pruning(tracker, units, compensate=False)
    with temporary_copy(tracker.current.model()) as trial_copy:
        apply(plan, [trial_copy], [])
        return float(flops(trial_copy, inputs)[1])

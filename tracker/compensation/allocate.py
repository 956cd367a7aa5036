"""One budget over many groups of units: each unit of cost is saved where it loses least."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from tracker.errors import SurgeryError

STOPS = 128  # widths of a group that are priced; the last step is refined to single ones


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """What a group loses as it shrinks.

    units:    how many it has
    errors:   relative error after 1, 2, … units are gone; no more than that many can go
    round_to: widths are to be multiples of it; floor: units that must remain
    """

    units: int
    errors: Sequence[float]
    round_to: int = 1
    floor: int = 1

    def stops(self) -> list[int]:
        """Removed counts that are allowed, 0 first."""
        most = min(len(self.errors), self.units - max(self.floor, 1))
        return [0, *(t for t in range(1, most + 1) if (self.units - t) % self.round_to == 0)]


def allocate(
    paths: Sequence[ErrorCurve],
    cost: Callable[[list[int]], float],
    budget: float,
    *,
    within: float = 0.02,
) -> list[int]:
    """How many units each group keeps, so that `cost(removed per group)` comes to `budget`.

    Greedy on error per cost saved, over the lower convex hulls of the paths; costs are taken anew as widths shrink.

    Raises:
        SurgeryError: The budget cannot be met to within the share `within`; the message says why.
    """
    stops = [path.stops() for path in paths]
    hulls = [_hull(path, s) for path, s in zip(paths, stops, strict=True)]
    removed, place = [0] * len(paths), [0] * len(paths)
    now = cost(removed)

    def rate(g: int) -> float:
        if place[g] + 1 == len(hulls[g]):
            return float("inf")
        (_, e), (after, worse) = hulls[g][place[g] : place[g] + 2]
        saved = now - cost([*removed[:g], after, *removed[g + 1 :]])
        return (worse - e) / saved if saved > 0 else (worse - e) * 1e300

    # Lazy: a price taken earlier stands at the head until it is taken anew.
    heap = [(rate(g), g) for g in range(len(paths))]
    heapify(heap)
    while now > budget and heap:
        _, g = heap[0]
        fresh = rate(g)
        if fresh == float("inf"):
            heapreplace(heap, (fresh, g))
            if heap[0][0] == float("inf"):
                break
            continue
        heapreplace(heap, (fresh, g))
        if heap[0][1] != g:
            continue
        before = list(removed)
        removed[g] = hulls[g][place[g] + 1][0]
        now = cost(removed)
        if now <= budget:
            removed = _refined(paths, stops, before, g, cost, budget)
            now = cost(removed)
            break
        place[g] += 1
        heapreplace(heap, (rate(g), g))
    if abs(now - budget) > within * abs(budget):
        raise SurgeryError(_why(now, budget, removed, stops, cost))
    return [path.units - t for path, t in zip(paths, removed, strict=True)]


def _refined(
    paths: Sequence[ErrorCurve],
    stops: Sequence[list[int]],
    before: list[int],
    first: int,
    cost: Callable[[list[int]], float],
    budget: float,
) -> list[int]:
    """The last step: of the least steps that reach the budget, in any group, and of none, the nearest to it."""
    found = [(abs(cost(before) - budget), -1, before)]
    for g, allowed in enumerate(stops):
        start = bisect_left(allowed, before[g])

        def costs(t: int, g: int = g) -> float:
            return -cost([*before[:g], t, *before[g + 1 :]])

        at = bisect_left(allowed, -budget, lo=start, key=costs)
        for i in {at - 1, at} & set(range(start, len(allowed))):
            trial = [*before[:g], allowed[i], *before[g + 1 :]]
            found.append((abs(cost(trial) - budget), 0 if g == first else g + 1, trial))
            if g == first and i == at and found[-1][0] <= 0.005 * abs(budget):
                return trial
    return min(found)[2]


def _hull(path: ErrorCurve, stops: list[int]) -> list[tuple[int, float]]:
    """Lower convex hull of (removed, error) over at most STOPS of the allowed stops."""
    stride = -(-len(stops) // STOPS)
    hull: list[tuple[int, float]] = []
    for t in sorted({*stops[::stride], stops[-1]}):
        e = float(path.errors[t - 1]) if t else 0.0
        while len(hull) > 1:
            (a, ea), (b, eb) = hull[-2:]
            if (eb - ea) * (t - b) < (e - eb) * (b - a):
                break
            hull.pop()
        hull.append((t, e))
    return hull


def _why(
    now: float,
    budget: float,
    removed: list[int],
    stops: Sequence[list[int]],
    cost: Callable[[list[int]], float],
) -> str:
    least = cost([s[-1] for s in stops])
    if least > budget:
        return (
            f"Cannot shrink to {budget:g}: with every group at its floor {least:g} remain. "
            "Lower the floors, protect fewer units, or ask for more."
        )
    if not any(removed):
        return (
            f"The cost is {now:g} already; there is nothing to remove for a budget of {budget:g}."
        )
    return (
        f"Cannot meet {budget:g}: the nearest reachable is {now:g}, as widths change in steps. "
        "Lower `round_to`, or ask for that."
    )

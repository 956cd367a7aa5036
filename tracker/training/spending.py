"""Which units go so that a look costs no more than it may: the next always where it costs the loss least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracker.training.choices import Candidate, Size

TRADE = 0.5  # share of what units elsewhere would gain that those may cost which make room for them
LEAST = 1e-300


def cheapest(
    errors: Mapping[str, Sequence[float]],
    free: Sequence[Candidate],
    tolerance: float,
    left: Size,
    measure: int,
) -> dict[str, int]:
    """How many of each group, together within the tolerance.

    errors: By group, once 1, 2, … are gone. left: What may go. measure: Which part of a cost is to be saved.
    """
    counts, spent = dict[str, int](), 0.0
    able = {c.name: c for c in free if errors[c.name]}

    def rise(c: Candidate) -> float:
        at = counts.get(c.name, 0)
        return errors[c.name][at] - (errors[c.name][at - 1] if at else 0.0)

    while able:
        best = min(able.values(), key=lambda c: rise(c) / max(c.cost[measure], LEAST))
        more, at = max(rise(best), 0.0), counts.get(best.name, 0)
        within = spent + more <= tolerance and errors[best.name][at] <= tolerance
        if not within or not min(fits(left, best.cost)):
            del able[best.name]
            continue
        counts[best.name] = at + 1
        spent, left = spent + more, less(left, best.cost, 1)
        if at + 1 == len(errors[best.name]):
            del able[best.name]
    return counts


def forced(
    free: Sequence[Candidate], most: Mapping[str, int], counts: dict[str, int], room: Size
) -> int:
    """Take more into `counts`, each where it loses least for what it costs, until the budget is met; how many."""
    taken = 0
    while min(room) < 0:
        short = next(i for i, space in enumerate(room) if space < 0)
        able = [c for c in free if counts.get(c.name, 0) < most[c.name] and c.cost[short] > 0]
        if not able:
            break
        best = min(able, key=lambda c: _rise(c, counts) / c.cost[short])
        counts[best.name] = counts.get(best.name, 0) + 1
        room = less(room, best.cost, -1)
        taken += 1
    return taken


def traded(
    free: Sequence[Candidate],
    most: Mapping[str, int],
    counts: dict[str, int],
    best: Candidate,
    count: int,
    measure: int,
) -> int:
    """Take more into `counts` that make room for `count` units of `best`, while they cost TRADE of what these gain."""
    others, taken = [c for c in free if c.name != best.name], 0
    for gain in best.gains[:count]:
        need = best.cost[measure]
        worth = TRADE * gain / max(need, LEAST)
        while need > 0:
            able = [
                c for c in others if counts.get(c.name, 0) < most[c.name] and c.cost[measure] > 0
            ]
            least = min(able, key=lambda c: _rise(c, counts) / c.cost[measure], default=None)
            if least is None or _rise(least, counts) > worth * least.cost[measure]:
                return taken
            counts[least.name] = counts.get(least.name, 0) + 1
            need -= least.cost[measure]
            taken += 1
    return taken


def fits(room: Size, each: Size) -> tuple[int, ...]:
    """How many units of cost `each` have room, by each measure that has a bound and a price."""
    found = [10**9]
    for space, price in zip(room, each, strict=True):
        if price > 0 and space < float("inf"):
            found.append(max(int(space // price), 0))
    return tuple(found)


def less(room: Size, each: Size, count: int) -> Size:
    """What is left of it."""
    return Size(*(space - count * price for space, price in zip(room, each, strict=True)))


def _rise(one: Candidate, counts: Mapping[str, int]) -> float:
    """Of the loss by the next unit of a group, after so many."""
    at = counts.get(one.name, 0)
    return one.errors[at] - (one.errors[at - 1] if at else 0.0)

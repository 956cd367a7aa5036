"""Why a budget cannot be met: how far all that may go would reach, what stands in the way, and what would free it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tracker.inputs.calls import Arguments
from tracker.structure import UnitGroup
from tracker.surgery.operations.budget import cost_of
from tracker.surgery.prices.protection import NOTHING
from tracker.surgery.prices.removal_problem import Limits, problems_of
from tracker.tracker import ActivationTracker

UNITS = {"parameters": "parameters", "flops": "FLOPs", "neurons": "prunable units"}


@dataclass(frozen=True, slots=True)
class KeepRequest:
    """What the user asked for, of which this may be one of several rounds.

    Attributes:
        keep: The share of the whole that is to stay.
        left: The share that is there now.
        last: Whether it is to be met by this round.
    """

    keep: float
    left: float = 1.0
    last: bool = True


def refusal(
    tracker: ActivationTracker,
    limits: Limits,
    of: str,
    asked: KeepRequest,
    nearest: Iterable[float],
) -> str:
    """Why the share cannot be kept, for people.

    nearest: Shares of what is there now that come nearest, where it is for steps of width alone that it cannot be met.
    """
    groups, _, left_out = problems_of(tracker, limits)
    reached = _reach(tracker, groups, limits, of) * asked.left
    text = f"Of the {UNITS[of]}, {asked.keep:.1%} cannot be kept: "
    if reached <= asked.keep:
        shares = sorted({round(share * asked.left, 3) for share in nearest})
        near = " and ".join(f"{share:.1%}" for share in shares)
        help_ = " Lower `round_to`, or ask for one of these." if limits.round_to > 1 else ""
        return f"{text}widths change in steps, and nearest are {near}.{help_ or ' Ask for one of these.'}"
    text += f"all that may go leaves {reached:.1%}. "
    ways = _ways(tracker, groups, limits)
    told = []
    for name, (why, other) in ways.items():
        freed, _, _ = problems_of(tracker, other)
        told.append(
            f"{why}; {name} could leave {_reach(tracker, freed, other, of) * asked.left:.1%}"
        )
    if told:
        return f"{text}In the way: {'. '.join(told)}."
    fixed = [f"{g.name} ({g.reason})" for g in tracker.structure().groups if not g.prunable]
    rest = "; ".join([*fixed[:3], *left_out[:3]])
    if not tracker.structure().groups:
        return (
            f"{text}No layer has two neurons or more of which one may go; print(engine.structure) says what is frozen, "
            "and why."
        )
    return text + (f"The rest cannot go: {rest}." if rest else "Each group keeps one unit.")


def _ways(
    tracker: ActivationTracker, groups: Sequence[UnitGroup], limits: Limits
) -> Mapping[str, tuple[str, Limits]]:
    """By the argument that would free more: what stands in the way, and the limits without it."""
    structure = tracker.structure()
    found: dict[str, tuple[str, Limits]] = {}
    inexact = [g.name for g in structure.groups if g.prunable and not g.exact]
    if inexact and not limits.inexact:
        why = f"a norm or softmax runs over the units of {_some(inexact)}"
        found["inexact=True"] = why, replace(limits, inexact=True)
    floors = {g.name: replace(limits, protected=NOTHING).of(g) for g in groups}
    high = [f"{g.name} ({floors[g.name]} of {g.size})" for g in groups if floors[g.name] > 1]
    if high:
        found["lower floors"] = f"floors of {_some(high)}", replace(limits, floor=1)
    kept = [g for g in structure.groups if g.prunable and limits.protected.floor(g)]
    if kept:
        names = [f"{g.name} ({limits.protected.floor(g)} of {g.size})" for g in kept]
        why = f"what `protect` keeps of {_some(names)}"
        found["less protection"] = why, replace(limits, protected=NOTHING)
    if limits.round_to > 1:
        why = f"widths are multiples of {limits.round_to}"
        found["a smaller round_to"] = why, replace(limits, round_to=1)
    return found


def _reach(
    tracker: ActivationTracker, groups: Sequence[UnitGroup], limits: Limits, of: str
) -> float:
    """The share that is left once all goes that may; FLOPs as far as weights make them."""
    if not groups:
        return 1.0
    inputs = Arguments(*tracker.current.observer.inputs)  # type: ignore[misc]
    cost = cost_of(tracker.current.model(), groups, of, inputs)
    gone = []
    for group in groups:
        step = math.lcm(limits.round_to, group.multiple_of)
        least = max(math.ceil(max(limits.of(group), 1) / step) * step, 1)
        gone.append(max(group.size - least, 0))
    return cost(gone) / max(cost([0] * len(groups)), 1e-300)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

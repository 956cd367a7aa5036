"""Compression: one budget over all groups, spent where the loss rises least, the consumers' weights taking over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tracker.compensation import ErrorCurve, Selection, allocate
from tracker.compensation.criteria import Criterion
from tracker.errors import SurgeryError
from tracker.inputs.calls import Arguments
from tracker.structure import UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery.apply import apply
from tracker.surgery.calibration.loss import Calibration
from tracker.surgery.loss_change import LossForecast
from tracker.surgery.operations.budget import (
    OF,
    PRECISE,
    WITHIN,
    Cost,
    achieved,
    below,
    cost_of,
    nearer,
    spread,
)
from tracker.surgery.operations.removal import plan_pruning
from tracker.surgery.operations.shortfall import UNITS, KeepRequest, refusal
from tracker.surgery.plan import Plan
from tracker.surgery.prices.criterion_inputs import RECONSTRUCTION, check_criterion, ordered
from tracker.surgery.prices.removal_problem import (
    Limits,
    Problem,
    Problems,
    chosen_units,
    problems_of,
)
from tracker.tracker import ActivationTracker
from tracker.utils.progress import bar

PRICED, EVEN, NEURONS, MIXED = "priced", "even", "even, neurons only", "half priced, half even"


@dataclass(frozen=True, slots=True)
class _Market:
    """What there is to remove, in which order, and what is left then."""

    tracker: ActivationTracker
    groups: Sequence[UnitGroup]
    problems: Problems
    found: Sequence[Selection]
    paths: Sequence[ErrorCurve]
    cost: Cost
    whole: float
    of: str
    inputs: Arguments
    chosen: bool  # by another criterion

    @property
    def free(self) -> list[int]:
        """Units of each group that go at no cost."""
        return [s.exact for s in self.found]

    def units(self, removed: Sequence[int]) -> dict[str, list[int]]:
        """The units of each group that go."""
        return {
            g.name: sorted(self.found[i].order[:n])
            if self.chosen
            else chosen_units(self.problems, i, g, n, self.found[i].order)
            for i, (g, n) in enumerate(zip(self.groups, removed, strict=True))
            if n
        }

    def left(self, removed: list[int]) -> float:
        """The cost of what stays; FLOPs are measured."""
        estimate = self.cost(removed)
        if self.of != "flops" or not any(removed):
            return estimate
        return achieved(self.tracker, self.units(removed), self.inputs, self.of, estimate)

    def meet(self, make: Callable[[float], list[int]], target: float) -> tuple[float, list[int]]:
        """How far off the target, of the whole, and what `make` removes for the budget that comes nearest."""
        budget, best = target, (math.inf, [0] * len(self.groups))
        for _ in range(6):
            removed = make(budget)
            left = self.left(removed)
            best = min(best, ((left - target) / self.whole, removed), key=lambda pair: abs(pair[0]))
            again = budget * target / max(left, 1e-9)  # what the estimate of costs did not see
            if abs(best[0]) <= PRECISE or abs(again - budget) < 1e-4 * target:
                break
            budget = again
        return best


def plan_compression(
    tracker: ActivationTracker,
    keep: float,
    of: str,
    limits: Limits,
    *,
    criterion: str | Criterion = RECONSTRUCTION,
    compensate: bool = True,
    strict: bool = False,
    calibration: Calibration | None = None,
    chosen: Callable[[], bool] = lambda: False,
    progress: bool | None = False,
    asked: KeepRequest | None = None,
) -> tuple[Plan, list[str]]:
    """The plan that keeps the share `keep` of the model's parameters, FLOPs, or prunable units.

    Where batches to measure on are known, several ways to spend the budget are tried on copies, and the one taken after
    which the loss is least: units by their prices in the loss, the same share of every group, the same share of every
    group of single neurons, and what lies half way between prices and the better of these two.

    criterion: In which order units go; how many of each group, their prices always say.
    strict: Refuse a budget that cannot be met to within 2%, rather than take the nearest below.
    calibration: What the loss is, and what it is measured on.
    chosen: Called when that has been, before the plan is drawn; tells whether it changed what is known of the data.
    asked: What the user asked for, if `keep` is a part of it: for messages.

    Raises:
        SurgeryError: It cannot be met; the message says why.
    """
    if of not in OF:
        raise SurgeryError(f"compress keeps a share of one of {', '.join(OF)}, not of {of!r}.")
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise SurgeryError(f"keep is a share between 0 and 1, not {keep!r}.")
    check_criterion(criterion)
    groups, problems, left_out = problems_of(tracker, limits)
    asked = asked or KeepRequest(keep)
    if not groups:
        raise SurgeryError(
            f"There is nothing to compress. {refusal(tracker, limits, of, asked, [])}"
        )
    market = _market(tracker, groups, problems, limits, of, criterion, progress=progress)
    wanted = _candidates(market, keep * market.whole)
    usable, notes = _within(wanted, market, keep, asked, limits, strict=strict)
    measured = calibration if calibration is not None and calibration.batches else None
    name, outlook = _best(
        tracker, market, usable, measured, compensate=compensate, progress=progress
    )
    if chosen():  # which units of a group go, all batches say
        _, problems, _ = problems_of(tracker, limits)
        weighed = _weighed(tracker, groups, problems, criterion, progress=progress)
        market = replace(market, problems=problems, found=[s for _, s in weighed])
    plan, more = plan_pruning(tracker, market.units(usable[name]), compensate)
    if plan.outlook is not None:
        outlook = replace(outlook, predicted_loss_change=plan.outlook.predicted_loss_change)
    plan = replace(plan, operation="compress", outlook=outlook)
    return plan, [*notes, *_told(name, outlook, measured), *more, *left_out]


def _market(
    tracker: ActivationTracker,
    groups: Sequence[UnitGroup],
    problems: Problems,
    limits: Limits,
    of: str,
    criterion: str | Criterion,
    *,
    progress: bool | None,
) -> _Market:
    model = tracker.current.model()
    found: list[Selection] = []
    prices: list[list[float]] = []
    weighed = _weighed(tracker, groups, problems, criterion, progress=progress)
    for group, (problem, selection) in zip(groups, weighed, strict=True):
        most = min(len(selection.order), group.size - max(limits.of(group), 1))
        relative = selection.errors / max(selection.total, 1e-300)
        price = _rising(problem, selection) if problems.priced else relative
        found.append(selection)
        prices.append(price[:most].tolist())
    paths = [
        ErrorCurve(g.size, e, round_to=math.lcm(limits.round_to, g.multiple_of), floor=limits.of(g))
        for g, e in zip(groups, prices, strict=True)
    ]
    inputs = Arguments(*tracker.current.observer.inputs)  # type: ignore[misc]
    cost = cost_of(model, groups, of, inputs)
    whole = cost([0] * len(groups))
    chosen = criterion != RECONSTRUCTION
    return _Market(tracker, groups, problems, found, paths, cost, whole, of, inputs, chosen)


def _weighed(
    tracker: ActivationTracker,
    groups: Sequence[UnitGroup],
    problems: Problems,
    criterion: str | Criterion,
    *,
    progress: bool | None,
) -> Iterator[tuple[Problem, Selection]]:
    """Group by group, the order in which its units go."""
    held = tensors(tracker.current.model())
    weighed = bar(problems, "Weighing units", "group", progress)
    for i, (group, problem) in enumerate(zip(groups, weighed, strict=True)):
        if criterion == RECONSTRUCTION:
            yield problem, problem.backward()
        else:
            weight = problems.plain(i).weight
            yield problem, ordered(held, group, problem, criterion, weight)


def _rising(problem: Problem, selection: Selection) -> torch.Tensor:
    """Prices along a selection, never falling: what seems to lower the loss does so on these batches."""
    if not len(selection.errors):
        return selection.errors
    rise = torch.maximum(problem.rise(selection), selection.errors)
    rise[: selection.exact] = selection.errors[: selection.exact]
    return rise.cummax(0).values


def _candidates(market: _Market, target: float) -> dict[str, tuple[float, list[int]]]:
    """Ways to spend the budget: removed units per group, and how far what is left is off the target."""
    paths, cost, groups = market.paths, market.cost, market.groups

    def by_price(budget: float) -> list[int]:
        kept = allocate(paths, cost, budget, within=1e9)
        removed = [g.size - k for g, k in zip(groups, kept, strict=True)]
        return nearer(removed, paths, market.free, cost, budget)

    def by_share(shares: Sequence[float]) -> Callable[[float], list[int]]:
        return lambda budget: spread(shares, paths, market.free, cost, budget)

    able = [float(len(p.stops()) > 1) for p in paths]
    lone = [a * _is_neurons(g) for a, g in zip(able, groups, strict=True)]
    found = {PRICED: market.meet(by_price, target), EVEN: market.meet(by_share(able), target)}
    if any(lone) and lone != able:
        found[NEURONS] = market.meet(by_share(lone), target)
    even = found.get(NEURONS, found[EVEN])
    mixed = [
        (a + b) / (2 * g.size) for a, b, g in zip(found[PRICED][1], even[1], groups, strict=True)
    ]
    found[MIXED] = market.meet(by_share(mixed), target)
    return found


def _is_neurons(group: UnitGroup) -> bool:
    """Whether a unit is one neuron or channel, and not a head of several."""
    made = [p for p, role in group.roles.items() if role == "produces"]
    return all(len(group.members[0][p]) == 1 for p in made)


def _within(
    found: Mapping[str, tuple[float, list[int]]],
    market: _Market,
    keep: float,
    asked: KeepRequest,
    limits: Limits,
    *,
    strict: bool,
) -> tuple[dict[str, list[int]], list[str]]:
    """The candidates that meet the budget; where none does, the nearest below."""
    usable = {
        n: removed for n, (off, removed) in found.items() if abs(off) <= WITHIN and any(removed)
    }
    if usable:
        return usable, []
    _, removed = min(found.values(), key=lambda pair: abs(pair[0]))
    target = keep * market.whole
    less = below(removed, market.paths, market.cost, target)
    left = market.left(less)
    if strict or left > target * (1 + 1e-6) or not any(less):
        nearest = [keep + off for off, _ in found.values()]
        raise SurgeryError(
            refusal(market.tracker, limits, market.of, asked, [*nearest, left / market.whole])
        )
    share = asked.left * left / market.whole
    note = (
        f"{asked.keep:.1%} of the {UNITS[market.of]} was asked; as widths change in steps, {share:.1%} is the nearest "
        "below"
    )
    return {PRICED: less}, [note] if asked.last else []


def _best(
    tracker: ActivationTracker,
    market: _Market,
    usable: Mapping[str, list[int]],
    calibration: Calibration | None,
    *,
    compensate: bool,
    progress: bool | None,
) -> tuple[str, LossForecast]:
    """The candidate after which the loss is least, each tried on a copy; the first where there is nothing to try on."""
    first = next(iter(usable))
    if calibration is None:
        return first, LossForecast()
    entry = tracker.current
    model, losses = entry.model(), dict[str, float]()
    with entry.observer.paused():
        before = calibration.value(model, model)
        for name, removed in bar(usable.items(), "Trying budgets", "candidate", progress):
            same = next((n for n in losses if usable[n] == removed), None)
            if same is not None:
                losses[name] = losses[same]
                continue
            plan, _ = plan_pruning(tracker, market.units(removed), compensate)
            with temporary_copy(model) as trial_copy:
                apply(plan, [trial_copy], [])
                loss = calibration.value(trial_copy, model)
            losses[name] = loss if math.isfinite(loss) else math.inf
    best = min(losses, key=lambda name: losses[name])
    return best, LossForecast(None, calibration.kind(model), before, losses[best], losses)


def _told(name: str, outlook: LossForecast, calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return []
    tried = ", ".join(f"{n}: {loss:.5g}" for n, loss in outlook.candidates.items())
    measured = f"measured on {calibration.told()}"
    return [f"chosen: {name}; {measured} ({tried})", *calibration.reader.notes()]

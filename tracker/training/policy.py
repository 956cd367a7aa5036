"""When to look, what to do, within which budget. Pure: numbers in, requests out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from tracker.errors import SurgeryError
from tracker.surgery.prices.protection import Protect, wanted
from tracker.training.choices import Bypass, Candidate, Requests, Size
from tracker.training.field_checks import (
    MEANING,
    is_plain,
    require_kinds,
    require_meaning,
    require_sensible,
)
from tracker.training.learning import weighed
from tracker.training.ramp import paced, step_of
from tracker.training.schedule import schedule
from tracker.training.spending import cheapest, fits, forced, less, traded
from tracker.training.subclasses import PASS_IT, name_of, subclass_named

if TYPE_CHECKING:
    from typing_extensions import Self

CLASS = "class"  # key of a subclass's name in plain data
LACKS = "lacks"  # of the names of what a subclass has beside plain data


@dataclass(frozen=True, slots=True)
class Policy:
    """How a network changes itself while it trains.

    Attributes:
        warm_up: Steps before the first look.
        every: Steps between two looks.
        look: Steps that are observed before each decision; between looks nothing is.
        tolerance: Relative rise of the loss that one look may cost, as its gradients and curvature predict it: up to it
            units go, in all groups together, each where it costs least for what it saves; of a young network
            no larger share of what a group does by now than of the loss, and with what its units would learn. Where no
            gradients come (compiled graphs, `gradients=False`), the error of the consumers relative to what they put
            out stands for it.
        at_most: Share of a group's units that may go, or come, at a time.
        floor, ceiling: Units of each group, at least and at most.
        shrink: Whether units may go.
        grow: Whether layers may be expanded, once the loss stands still: where it is predicted to fall most for what a
            unit costs. A network that may not become larger also gives up units where they cost less than that.
        recycle: Whether units that say nothing get a new start in their places, rather than go.
        dormant: With `recycle`, also units that say little: whose mean |activation|, as each of their consumers reads
            it in the look's passes, is at most this share of their group's mean (ReDo: Sokar et al., 2023).
        merge: Whether redundant units are folded into others, pair by pair, up to the tolerance, before any go.
        insert: Layers that may be inserted in all, one at a time, once the loss stands still and none can be expanded.
        drop: Relative error of the model's outputs up to which a layer or a residual block is removed, one at a time,
            what is left refitted; measured on inputs that the fit did not see. 0: none is.
        gradients: Whether the gradients of the look's passes are used: for what changes cost in the loss, and for new
            units of linear layers, which look where it falls fastest; else, and where they tell nothing, these begin in
            random directions.
        plateau: Relative improvement of the loss between two looks below which it stands still; 1: always.
        min_parameters, max_parameters: Between which the network stays; None for no bound. Where it is larger than the
            greatest at the beginning, units go beyond the tolerance until it is not.
        min_flops, max_flops: The same of the FLOPs of a forward pass of the example inputs.
        min_latency, max_latency: The same of the milliseconds that such a pass takes, measured at each look. Time is
            noisy: with one of these, the same seed may give another structure.
        settle: Steps after a change over which its effect is measured.
        regret: Relative rise of the loss by a change from which on it is undone: see docs/self_modification.md.
            Infinite: none is, nor can it be by `undo`; a change then keeps no copy of what it replaced.
        patience: At which look from then on a group is tried again after a change of it was undone.
        protect: What is left alone: names or patterns ("encoder.*") of layers, modules or groups, and neuron ids; or
            {name or pattern: share that stays} of the units that a group had at the first look.
        until: The last step at which something may change, so that the rest of a run is left in peace; None: no such.
        ramp: How the way to the budgets above is spread over the looks up to `until`: at 1 in equal parts, at 3 large
            ones first, (1 - t)³ of the way left after the share t of them (Zhu & Gupta, 2017). Growth that has a budget
            does not wait for the loss then. None, or without `until`: at once.
        newborn: At how many looks a unit that came is left alone: it neither goes nor gets a new start.

    Examples:
        >>> from tracker import Policy
        >>> policy = Policy(warm_up=500, every=200, max_parameters=100, protect=["4"])
        >>> Policy.from_dict(policy.to_dict()) == policy
        True
        >>> engine.start_self_modification(policy)
    """

    warm_up: int = 200
    every: int = 200
    look: int = 16
    tolerance: float = 1e-3
    at_most: float = 0.5
    floor: int = 4
    ceiling: int | None = None
    shrink: bool = True
    grow: bool = False
    recycle: bool = False
    merge: bool = False
    insert: int = 0
    drop: float = 0.0
    gradients: bool = True
    plateau: float = 0.02
    min_parameters: int | None = None
    max_parameters: int | None = None
    min_flops: int | None = None
    max_flops: int | None = None
    min_latency: float | None = None
    max_latency: float | None = None
    settle: int = 50
    regret: float = 0.1
    patience: int = 3
    protect: Protect = ()
    until: int | None = None
    ramp: float | None = None
    newborn: int = 2
    dormant: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        require_sensible(self, _kinds())
        if self.look + self.settle > self.every:
            raise SurgeryError(
                f"A policy that looks for {self.look} steps and settles for {self.settle} cannot do so every "
                f"{self.every} steps. Make `every` larger."
            )
        names, ids = wanted(self.protect)
        if not isinstance(self.protect, Mapping):
            object.__setattr__(self, "protect", (*names, *sorted(ids)))

    @property
    def times(self) -> bool:
        """Whether the model's latency counts."""
        return self.min_latency is not None or self.max_latency is not None

    def over_budget(self, now: Size) -> bool:
        """Whether a network of this size is larger than it may be.

        Args:
            now: Size of the network.
        """
        return min(self._bounds(now, least=False)) < 0

    @property
    def trades(self) -> bool:
        """Whether units may go to make room for others."""
        tops = (self.max_parameters, self.max_flops, self.max_latency)
        return self.grow and self.shrink and any(top is not None for top in tops)

    def at(self, step: int) -> tuple[int, Policy]:
        """The step from which a policy holds at `step`, and that policy: always this one.

        Args:
            step: Of the run, counted from 0.
        """
        return 0, self

    def policies(self) -> tuple[Policy, ...]:
        """All policies that may hold: this one."""
        return (self,)

    def decide(
        self,
        candidates: Sequence[Candidate],
        now: Size,
        losses: Sequence[float],
        blocked: Mapping[str, int],
        *,
        bypasses: Sequence[Bypass] = (),
        inserted: int = 0,
        looks_left: int | None = None,
        falling: float = 0.0,
    ) -> Requests:
        """What to do now.

        Args:
            candidates: The groups that can change.
            now: Size of the network.
            losses: Mean loss before each look so far, the last one now.
            blocked: Groups and layers that are left alone for so many looks.
            bypasses: Layers and blocks that could be removed.
            inserted: Layers that were inserted so far.
            looks_left: That follow this one up to `until`; None where nobody knows.
            falling: Relative fall of the loss up to the next look at the pace of training, beyond chance: what units
                that go take their share of.
        """
        share = step_of(looks_left, self.ramp)
        free = [c for c in candidates if not blocked.get(c.name)]
        silent = {c.name: tuple(sorted({*c.dead, *c.dormant})) for c in free}
        dead = {c.name: silent[c.name] for c in free if 0 < len(silent[c.name]) < c.size}
        if self.recycle and dead:
            count = sum(map(len, dead.values()))
            little = " or little" if any(c.dormant for c in free) else ""
            return Requests(f"{count} units say nothing{little}", recycle=dead)
        merge = self._merging(free, now, share, falling) if self.merge else {}
        if merge:
            count = sum(map(len, merge.values()))
            what = "a rise of the loss by" if all(c.in_loss for c in free) else "an error of"
            why = f"{count} units can be folded into others within {what} {self.tolerance:.2%}"
            return Requests(why, merge=merge)
        remove, why = self._removal(free, now, share, falling)
        if remove:
            return Requests(why, remove=remove)
        drop = self._dropping([b for b in bypasses if not blocked.get(b.name)], now)
        if drop is not None:
            return Requests(
                f"without {drop.name} the outputs err by {drop.error:.2g}", drop=(drop.name,)
            )
        if bypasses:
            least = min(bypasses, key=lambda b: b.error)
            why += f", and without {least.name} the outputs would err by {least.error:.2g}"
        grown = self._growth(free, now, losses, why, share)
        return grown if grown.groups else self._insertion(free, now, losses, inserted, grown)

    @staticmethod
    def of(rule: Any, **settings: Any) -> Policy:
        """A policy that decides by a function, or by an object with `decide`: see docs/self_modification.md.

        Args:
            rule: `rule(candidates, now, losses, blocked)` → Requests, or None for nothing to do.
            settings: Fields of a Policy: when to look, what is looked for (`grow`, `merge`, `drop`, `insert`), what is
                protected, when a change is taken back.

        Raises:
            SurgeryError: It cannot decide, or a setting makes no sense.
        """
        from tracker.training.custom_policies import OwnPolicy

        unknown = sorted(set(settings) - {f.name for f in fields(Policy)})
        if unknown:
            raise SurgeryError(f"A policy has no {unknown[0]!r}.")
        return OwnPolicy(rule=rule, **settings)

    @classmethod
    def over(cls, steps: int, **settings: Any) -> Self:
        """A policy for a run of so many steps: when it looks, settles and ends are shares of them.

        Args:
            steps: Of the whole run, 24 or more. See `tracker.training.schedule`.
            settings: Other fields, and those of the schedule that are to be otherwise.

        Raises:
            SurgeryError: There is no such setting, it makes no sense, or the run is too short.
        """
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            raise SurgeryError(f"A policy has no {unknown[0]!r}.")
        return cls(**{**schedule(steps), **settings})

    def fitted(self, steps: int) -> Self:
        """The same policy for a run of so many steps: what its schedule leaves as it is by default is fitted.

        Args:
            steps: Of the whole run.

        Raises:
            SurgeryError: The run is too short, or what is not fitted does not go with the rest.
        """
        usual = {f.name: f.default for f in fields(self)}
        fitted: dict[str, Any] = {
            n: v for n, v in schedule(steps).items() if getattr(self, n) == usual[n]
        }
        return replace(self, **fitted)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; of a subclass with the name of its class, which `from_dict` looks for.

        What a subclass has beside plain data is only named.
        """
        if type(self) is Policy:
            return asdict(self) | MEANING
        settings = Policy(**{f.name: getattr(self, f.name) for f in fields(Policy)}).to_dict()
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in settings}
        own |= {n: v for n, v in getattr(self, "__dict__", {}).items() if n not in settings}
        plain = {name: value for name, value in own.items() if is_plain(value)}
        known = {f.name for f in fields(self) if f.init}
        lacking = sorted(name for name in own if name not in plain or name not in known)
        told: dict[str, Any] = {LACKS: lacking} if lacking else {}
        return settings | copy.deepcopy(plain) | {CLASS: name_of(type(self))} | told

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Policy | Phases:
        """The policy, or the phases, of plain data.

        Args:
            data: What `to_dict` gave.

        Raises:
            SurgeryError: It is none.
        """
        if "phases" in data:
            if set(data) != {"phases"} or not isinstance(data["phases"], list):
                raise SurgeryError("Phases are a list of [step, policy], and nothing else.")
            parts = []
            for part in data["phases"]:
                if not isinstance(part, list) or len(part) != 2 or not isinstance(part[1], dict):
                    raise SurgeryError(f"A phase is [step, policy], not {part!r}.")
                parts.append((part[0], _policy(part[1])))
            return Phases(parts)
        return _policy(data)

    def _bounds(self, now: Size, least: bool) -> Size:
        """What may still go (`least`), or come; negative where the network is beyond."""
        if least:
            floors = (self.min_parameters, self.min_flops, self.min_latency)
            return Size(*(n - (bound or 0) for n, bound in zip(now, floors, strict=True)))
        tops = (self.max_parameters, self.max_flops, self.max_latency)
        return Size(
            *(float("inf") if top is None else top - n for n, top in zip(now, tops, strict=True))
        )

    def _merging(
        self, free: Sequence[Candidate], now: Size, share: float | None, falling: float
    ) -> dict[str, tuple[tuple[int, int], ...]]:
        left, _ = self._paced(now, share)
        errors = {
            c.name: weighed(
                c.merge_errors[: self._most(c)], tuple(drop for _, drop in c.pairs), c, now, falling
            )
            for c in free
        }
        counts = cheapest(errors, free, self.tolerance, left, self._measure)
        return {c.name: c.pairs[: counts[c.name]] for c in free if counts.get(c.name)}

    def _paced(self, now: Size, share: float | None) -> tuple[Size, Size]:
        """What may go, and come, at a look that takes this share of the way to its budgets."""
        lows = (self.min_parameters, self.min_flops, self.min_latency)
        bounded = tuple(low is not None for low in lows)
        return paced(self._bounds(now, least=True), self._bounds(now, least=False), bounded, share)

    def _most(self, one: Candidate) -> int:
        """Units of a group that may go at a time."""
        return max(min(int(self.at_most * one.size), one.size - max(self.floor, one.floor)), 0)

    @property
    def _measure(self) -> int:
        """Which of parameters, FLOPs and milliseconds counts."""
        lows = self.min_parameters, self.min_flops, self.min_latency
        tops = self.max_parameters, self.max_flops, self.max_latency
        bound = [low is not None or top is not None for low, top in zip(lows, tops, strict=True)]
        return max((i for i in range(3) if bound[i]), default=0)

    def _dropping(self, able: Sequence[Bypass], now: Size) -> Bypass | None:
        """Of the layers without which the outputs err little enough, the one that saves most for what they err."""
        least, most = self._bounds(now, least=True), self._bounds(now, least=False)
        fit = [
            b
            for b in able
            if b.error <= self.drop and min(less(least, b.cost, 1)) >= 0
            # What reads a narrow layer may become larger without it.
            if all(m >= 0 or c > 0 for m, c in zip(less(most, b.cost, -1), b.cost, strict=True))
        ]
        if self.drop <= 0 or not fit:
            return None
        # Errors that are next to nothing do not count: a whole block goes rather than its smallest layer.
        return min(fit, key=lambda b: max(b.error, self.drop / 100) / max(b.cost.parameters, 1.0))

    def _insertion(
        self,
        free: Sequence[Candidate],
        now: Size,
        losses: Sequence[float],
        inserted: int,
        otherwise: Requests,
    ) -> Requests:
        if inserted >= self.insert or not self._still(losses):
            return otherwise
        room = self._bounds(now, least=False)
        able = [
            (c.errors[0] / max(c.deeper.parameters, 1.0), c.layer)
            for c in free
            if c.deeper is not None and c.errors and min(less(room, c.deeper, 1)) >= 0
        ]
        if not able:
            return Requests("no layer can be inserted within the budget")
        layer = max(able, key=lambda pair: pair[0])[1]
        still = "the loss stands still" if self.plateau < 1 else "it is time to grow"
        return Requests(f"{still}, and fullest for its cost: {layer}", insert=(layer,))

    def _still(self, losses: Sequence[float]) -> bool:
        return not (len(losses) < 2 or losses[-1] < (1 - self.plateau) * losses[-2])

    def _removal(
        self, free: Sequence[Candidate], now: Size, share: float | None, falling: float
    ) -> tuple[dict[str, tuple[int, ...]], str]:
        if not self.shrink:
            return {}, "nothing is to shrink"
        left, room = self._paced(now, share)
        most = {c.name: min(self._most(c), len(c.order)) for c in free}
        errors = {c.name: weighed(c.errors[: most[c.name]], c.order, c, now, falling) for c in free}
        counts = cheapest(errors, free, self.tolerance, left, self._measure)
        what = "a rise of the loss by" if all(c.in_loss for c in free) else "an error of"
        within = f"{what} {self.tolerance:.2%}"
        if any(c.effect < 1 for c in free):
            within += ", and of what they do by now,"
        if falling:
            within += (
                f" with their share of the {falling:.2%} that training gains up to the next look"
            )
        going = sum(counts.values())
        why = f"{going} unit{'s' * (going != 1)} can go within {within}"
        whole = self._bounds(now, least=False)
        for one in free:
            room = less(room, one.cost, -counts.get(one.name, 0))
            whole = less(whole, one.cost, -counts.get(one.name, 0))
        beyond = forced(free, most, counts, room)
        if beyond:
            why = (
                f"the network is larger than its budget: {sum(counts.values())} units go, "
                f"{beyond} of them beyond {within}"
            )
        elif given := self._given_up(free, most, counts, whole):
            why = f"{given} units that cost less than what as many elsewhere would gain make room"
        if not counts:
            why = f"no unit can go within {within}"
        return {c.name: c.order[: counts[c.name]] for c in free if counts.get(c.name)}, why

    def _given_up(
        self, free: Sequence[Candidate], most: Mapping[str, int], counts: dict[str, int], room: Size
    ) -> int:
        """Units that go, where there is no room left, for those that would gain more."""
        able = [c for c in free if c.gains and (self.ceiling is None or c.size < self.ceiling)]
        if not self.grow or min(room) == float("inf") or not able:
            return 0
        best = max(able, key=self._gain)
        count = min(max(1, int(self.at_most * best.size)), len(best.gains))
        if min(fits(room, best.cost)) >= count:
            return 0
        return traded(free, most, counts, best, count, self._measure)

    def _gain(self, one: Candidate) -> float:
        """What the next unit gains for its cost."""
        return one.gains[0] / max(one.cost[self._measure], 1e-300)

    def _growth(
        self,
        free: Sequence[Candidate],
        now: Size,
        losses: Sequence[float],
        otherwise: str,
        share: float | None,
    ) -> Requests:
        if not self.grow:
            return Requests(otherwise)
        _, room = self._paced(now, share)
        scheduled = share is not None and min(room) < float("inf")
        if not scheduled and not self._still(losses):
            return Requests("the loss still falls")

        def worth(c: Candidate) -> float:
            """What a unit gains for its cost or, where that is not known of all, what the least of them matters."""
            if known:
                return self._gain(c)
            return c.errors[0] / max(c.cost[self._measure], 1e-300)

        able = [c for c in free if c.errors and (self.ceiling is None or c.size < self.ceiling)]
        known = all(c.gains for c in able)
        ranked = sorted(able, key=worth, reverse=True)
        expand: dict[str, int] = {}
        for one in ranked:
            if worth(one) < worth(ranked[0]) / 2:
                break
            count = max(1, int(self.at_most * one.size))
            if self.ceiling is not None:
                count = min(count, self.ceiling - one.size)
            count = min(count, *fits(room, one.cost))
            if count > 0:
                expand[one.name] = count
                room = less(room, one.cost, count)
        if not expand:
            what = "what its schedule has for this look" if scheduled else "its budget"
            return Requests(f"a larger network would exceed {what}")
        names = ", ".join(c.layer for c in ranked if c.name in expand)
        waits = self.plateau < 1 and not scheduled
        still = "the loss stands still" if waits else "it is time to grow"
        return Requests(f"{still}, and full: {names}", expand=expand)


@dataclass(frozen=True, slots=True)
class Phases:
    """Policies one after the other, each with steps, looks and warm-up counted from its own beginning.

    Attributes:
        parts: (the step at which it begins, policy, or what `Policy.of` takes), in order; the first begins at 0.

    Examples:
        >>> from tracker import Phases, Policy
        >>> grow = Policy(warm_up=0, every=100, shrink=False, grow=True, plateau=1.0)
        >>> phases = Phases([(0, grow), (1_000, Policy())])
        >>> phases.at(1_200)[1].grow
        False
    """

    parts: tuple[tuple[int, Policy], ...]

    def __init__(self, parts: Iterable[tuple[int, Any]]) -> None:
        from tracker.training.custom_policies import as_policy

        try:
            made = tuple((step, as_policy(policy)) for step, policy in parts)
            object.__setattr__(self, "parts", made)
        except (TypeError, ValueError) as error:
            raise SurgeryError(f"Phases are [(step, policy), ...], not {parts!r}.") from error
        starts = [step for step, _ in self.parts]
        whole = all(type(step) is int for step in starts)
        if not whole or not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise SurgeryError(
                f"Phases begin at steps that grow, the first at 0, not at {starts!r}."
            )

    def at(self, step: int) -> tuple[int, Policy]:
        """The step from which a policy holds at `step`, and that policy.

        Args:
            step: Of the run, counted from 0.
        """
        return [part for part in self.parts if part[0] <= step][-1]

    def policies(self) -> tuple[Policy, ...]:
        """All policies, in order."""
        return tuple(policy for _, policy in self.parts)

    def fitted(self, steps: int) -> Phases:
        """The same phases, the last of them fitted to what is left of a run of so many steps; see `Policy.fitted`.

        Args:
            steps: Of the whole run.

        Raises:
            SurgeryError: Too little is left.
        """
        start, last = self.parts[-1]
        return Phases([*self.parts[:-1], (start, last.fitted(steps - start))])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `Policy.from_dict` reads it."""
        return {"phases": [[step, policy.to_dict()] for step, policy in self.parts]}


def _policy(data: Mapping[str, Any]) -> Policy:
    data = dict(data)
    require_meaning(data)
    if "rule" in data and CLASS not in data:
        from tracker.training.custom_policies import rule_named

        rule = rule_named(data.pop("rule"))
        settings = _policy(data | MEANING)
        return Policy.of(rule, **{f.name: getattr(settings, f.name) for f in fields(Policy)})
    name = data.pop(CLASS, "")
    kind = subclass_named(name, Policy) if name else Policy
    if lacking := data.pop(LACKS, None):
        raise SurgeryError(
            f"The policy is a {name}, of which no checkpoint could hold {', '.join(map(str, lacking))}: no plain data. "
            f"{PASS_IT}"
        )
    unknown = set(data) - {f.name for f in fields(kind) if f.init}
    if unknown:
        raise SurgeryError(f"A policy has no {sorted(unknown)[0]!r}.")
    require_kinds(data, _kinds())  # of a subclass, its own `__post_init__` checks the rest
    try:
        return kind(**data)
    except TypeError as error:  # a constructor of its own
        raise SurgeryError(f"The policy is a {name}, and {error}. {PASS_IT}") from error


@functools.cache
def _kinds() -> dict[str, Any]:
    # What is protected has checks of its own.
    return {name: kind for name, kind in get_type_hints(Policy).items() if name != "protect"}

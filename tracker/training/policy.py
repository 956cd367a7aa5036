"""When to look, what to do, within which budget. Pure: numbers in, requests out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from tracker.errors import SurgeryError


class Size(NamedTuple):
    """Of a network, or of one unit of it. flops: of one forward pass of the example inputs."""

    parameters: float
    flops: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one group of units when the policy looks.

    size: Units.
    errors: Predicted relative error of its consumers once 1, 2, … units are gone, in `order`.
    cost: Of one unit.
    dead: Units of which the consumers read a constant.
    """

    name: str
    layer: str
    size: int
    order: tuple[int, ...]
    errors: tuple[float, ...]
    cost: Size
    dead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Requests:
    """What a policy wants done, and why, or why nothing.

    remove, recycle: Group name → units. expand: Group name → units to add.
    """

    why: str
    remove: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recycle: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    expand: Mapping[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """All that is to change."""
        return (*self.remove, *self.recycle, *self.expand)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a network changes itself while it trains.

    warm_up: Steps before the first look.
    every: Steps between two looks.
    look: Steps that are observed before each decision; between looks nothing is.
    tolerance: Predicted relative error of the consumers up to which units go, in all groups at once.
    at_most: Share of a group's units that may go, or come, at a time.
    floor, ceiling: Units of each group, at least and at most.
    shrink: Whether units may go.
    grow: Whether layers may be expanded, once the loss stands still.
    recycle: Whether units that say nothing get a new start in their places, rather than go.
    plateau: Relative improvement of the loss between two looks below which it stands still; 1: always.
    min_parameters, max_parameters: Between which the network stays; None for no bound. Where it is larger than the
        greatest at the beginning, units go beyond the tolerance until it is not.
    min_flops, max_flops: The same of the FLOPs of a forward pass of the example inputs.
    settle: Steps after a change over which its effect is measured.
    regret: Relative rise of the loss, against that before the change, from which on it is undone.
    patience: Looks for which a group is left alone after a change of it was undone.
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
    plateau: float = 0.02
    min_parameters: int | None = None
    max_parameters: int | None = None
    min_flops: int | None = None
    max_flops: int | None = None
    settle: int = 50
    regret: float = 0.1
    patience: int = 3

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("every", "look", "settle", "floor"):
            if getattr(self, name) < 1:
                raise SurgeryError(f"{name} of a policy is 1 or more, not {getattr(self, name)!r}.")
        if self.look + self.settle > self.every:
            raise SurgeryError(
                f"A policy that looks for {self.look} steps and settles for {self.settle} cannot do so every "
                f"{self.every} steps. Make `every` larger."
            )
        if not 0 < self.at_most < 1:
            raise SurgeryError(f"at_most is a share between 0 and 1, not {self.at_most!r}.")

    def at(self, step: int) -> tuple[int, Policy]:
        """The step from which a policy holds at `step`, and that policy: always this one."""
        return 0, self

    def decide(
        self,
        candidates: Sequence[Candidate],
        now: Size,
        losses: Sequence[float],
        blocked: Mapping[str, int],
    ) -> Requests:
        """What to do now.

        Args:
            candidates: The groups that can change.
            now: Size of the network.
            losses: Mean loss before each look so far, the last one now.
            blocked: Groups that are left alone for so many looks.
        """
        free = [c for c in candidates if not blocked.get(c.name)]
        dead = {c.name: c.dead for c in free if c.dead and len(c.dead) < c.size}
        if self.recycle and dead:
            count = sum(map(len, dead.values()))
            return Requests(f"{count} units say nothing", recycle=dead)
        remove, why = self._removal(free, now)
        return Requests(why, remove=remove) if remove else self._growth(free, now, losses, why)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Policy | Phases:
        """The policy, or the phases, of plain data.

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
            return Size(
                now.parameters - (self.min_parameters or 0), now.flops - (self.min_flops or 0)
            )
        infinite = float("inf")
        most = infinite if self.max_parameters is None else self.max_parameters
        fast = infinite if self.max_flops is None else self.max_flops
        return Size(most - now.parameters, fast - now.flops)

    def _removal(
        self, free: Sequence[Candidate], now: Size
    ) -> tuple[dict[str, tuple[int, ...]], str]:
        if not self.shrink:
            return {}, "nothing is to shrink"
        left, counts = self._bounds(now, least=True), dict[str, int]()
        most = {
            c.name: min(int(self.at_most * c.size), c.size - self.floor, len(c.order)) for c in free
        }
        for one in free:
            count = sum(error <= self.tolerance for error in one.errors[: max(most[one.name], 0)])
            count = min(count, *_fits(left, one.cost))
            if count > 0:
                counts[one.name] = count
                left = _less(left, one.cost, count)
        why = f"{sum(counts.values())} units can go within an error of {self.tolerance:g}"
        room = self._bounds(now, least=False)
        for one in free:
            room = _less(room, one.cost, -counts.get(one.name, 0))
        forced = self._forced(free, most, counts, room)
        if forced:
            why = f"the network is larger than its budget: {forced} units beyond an error of {self.tolerance:g} go"
        if not counts:
            why = f"no unit can go within an error of {self.tolerance:g}"
        return {c.name: c.order[: counts[c.name]] for c in free if counts.get(c.name)}, why

    @staticmethod
    def _forced(
        free: Sequence[Candidate], most: Mapping[str, int], counts: dict[str, int], room: Size
    ) -> int:
        """Take more, unit by unit, each where it loses least for what it costs, until the budget is met."""
        taken = 0
        while min(room) < 0:
            short = 0 if room.parameters < 0 else 1
            able = [c for c in free if counts.get(c.name, 0) < most[c.name] and c.cost[short] > 0]
            if not able:
                break

            def price(c: Candidate, short: int = short) -> float:
                at = counts.get(c.name, 0)
                return (c.errors[at] - (c.errors[at - 1] if at else 0.0)) / c.cost[short]

            best = min(able, key=price)
            counts[best.name] = counts.get(best.name, 0) + 1
            room = _less(room, best.cost, -1)
            taken += 1
        return taken

    def _growth(
        self, free: Sequence[Candidate], now: Size, losses: Sequence[float], otherwise: str
    ) -> Requests:
        if not self.grow:
            return Requests(otherwise)
        if len(losses) < 2 or losses[-1] < (1 - self.plateau) * losses[-2]:
            return Requests("the loss still falls")
        room = self._bounds(now, least=False)

        def worth(c: Candidate) -> float:
            """Where the unit that matters least matters most for what it costs."""
            return c.errors[0] / max(c.cost.parameters, 1.0)

        able = [c for c in free if c.errors and (self.ceiling is None or c.size < self.ceiling)]
        ranked = sorted(able, key=worth, reverse=True)
        expand: dict[str, int] = {}
        for one in ranked:
            if worth(one) < worth(ranked[0]) / 2:
                break
            count = max(1, int(self.at_most * one.size))
            if self.ceiling is not None:
                count = min(count, self.ceiling - one.size)
            count = min(count, *_fits(room, one.cost))
            if count > 0:
                expand[one.name] = count
                room = _less(room, one.cost, count)
        if not expand:
            return Requests("a larger network would exceed its budget")
        names = ", ".join(c.layer for c in ranked if c.name in expand)
        still = "the loss stands still" if self.plateau < 1 else "it is time to grow"
        return Requests(f"{still}, and full: {names}", expand=expand)


@dataclass(frozen=True, slots=True)
class Phases:
    """Policies one after the other, each with steps, looks and warm-up counted from its own beginning.

    parts: (the step at which it begins, policy), in order; the first begins at 0.
    """

    parts: tuple[tuple[int, Policy], ...]

    def __init__(self, parts: Iterable[tuple[int, Policy]]) -> None:
        try:
            object.__setattr__(self, "parts", tuple((step, policy) for step, policy in parts))
        except (TypeError, ValueError) as error:
            raise SurgeryError(f"Phases are [(step, policy), ...], not {parts!r}.") from error
        starts = [step for step, _ in self.parts]
        whole = all(type(step) is int for step in starts)
        if not whole or not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise SurgeryError(
                f"Phases begin at steps that grow, the first at 0, not at {starts!r}."
            )

    def at(self, step: int) -> tuple[int, Policy]:
        """The step from which a policy holds at `step`, and that policy."""
        return [part for part in self.parts if part[0] <= step][-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `Policy.from_dict` reads it."""
        return {"phases": [[step, policy.to_dict()] for step, policy in self.parts]}


def _policy(data: Mapping[str, Any]) -> Policy:
    unknown = set(data) - {f.name for f in fields(Policy)}
    if unknown:
        raise SurgeryError(f"A policy has no {sorted(unknown)[0]!r}.")
    usual = Policy()
    for name, value in data.items():
        kind = type(getattr(usual, name))
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is type(None):  # a bound
            fits = value is None or type(value) is int
        if not fits:
            raise SurgeryError(f"{name} of a policy is not {value!r}.")
    return Policy(**data)


def _fits(room: Size, each: Size) -> tuple[int, ...]:
    """How many units of cost `each` have room, by each measure that has a bound and a price."""
    found = [10**9]
    for space, price in zip(room, each, strict=True):
        if price > 0 and space < float("inf"):
            found.append(max(int(space // price), 0))
    return tuple(found)


def _less(room: Size, each: Size, count: int) -> Size:
    return Size(*(space - count * price for space, price in zip(room, each, strict=True)))

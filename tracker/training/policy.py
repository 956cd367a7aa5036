"""When to look, what to do, within which budget. Pure: numbers in, requests out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tracker.errors import SurgeryError


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one group of units when the policy looks.

    errors: Predicted relative error of its consumers once 1, 2, … units are gone, in `order`.
    parameters: That one unit costs.
    """

    name: str
    layer: str
    size: int
    order: tuple[int, ...]
    errors: tuple[float, ...]
    parameters: float


@dataclass(frozen=True, slots=True)
class Requests:
    """What a policy wants done: units to remove by group, or neurons to add by layer; and why, or why nothing."""

    remove: Mapping[str, tuple[int, ...]]
    expand: Mapping[str, int]
    why: str


@dataclass(frozen=True, slots=True)
class Policy:
    """How a network changes itself while it trains.

    warm_up: Steps before the first look.
    every: Steps between two looks.
    look: Steps that are observed before each decision; between looks nothing is.
    tolerance: Predicted relative error of the consumers up to which units go, in all groups at once.
    at_most: Share of a group's units that may go, or come, at a time.
    floor: Units that stay in each group.
    shrink: Whether units may go.
    grow: Whether layers may be expanded, once the loss stands still.
    plateau: Relative improvement of the loss between two looks below which it stands still.
    min_parameters, max_parameters: Between which the network stays; None for no bound.
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
    shrink: bool = True
    grow: bool = False
    plateau: float = 0.02
    min_parameters: int | None = None
    max_parameters: int | None = None
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

    def decide(
        self,
        candidates: Sequence[Candidate],
        parameters: int,
        losses: Sequence[float],
        blocked: Mapping[str, int],
    ) -> Requests:
        """What to do now.

        Args:
            candidates: The groups that can change.
            parameters: Of the network.
            losses: Mean loss before each look so far, the last one now.
            blocked: Groups that are left alone for so many looks.
        """
        free = [c for c in candidates if not blocked.get(c.name)]
        left = float(parameters - (self.min_parameters or 0))
        remove: dict[str, tuple[int, ...]] = {}
        for one in free if self.shrink else ():
            most = min(int(self.at_most * one.size), one.size - self.floor, len(one.order))
            count = sum(error <= self.tolerance for error in one.errors[: max(most, 0)])
            count = min(count, int(left // max(one.parameters, 1.0)))
            if count > 0:
                remove[one.name] = one.order[:count]
                left -= count * one.parameters
        if remove:
            total = sum(map(len, remove.values()))
            return Requests(
                remove, {}, f"{total} units can go within an error of {self.tolerance:g}"
            )
        return self._growth(free, parameters, losses)

    def _growth(
        self, free: Sequence[Candidate], parameters: int, losses: Sequence[float]
    ) -> Requests:
        if not self.grow:
            return Requests({}, {}, f"no unit can go within an error of {self.tolerance:g}")
        if len(losses) < 2 or losses[-1] < (1 - self.plateau) * losses[-2]:
            return Requests({}, {}, "the loss still falls")
        room = float("inf") if self.max_parameters is None else self.max_parameters - parameters
        # Where the unit that matters least matters most for what it costs.
        ranked = sorted(
            (c for c in free if c.errors and c.parameters <= room),
            key=lambda c: -c.errors[0] / max(c.parameters, 1.0),
        )
        if not ranked:
            return Requests(
                {}, {}, f"a larger network would exceed {self.max_parameters} parameters"
            )
        best = ranked[0]
        count = max(1, int(min(self.at_most * best.size, room // max(best.parameters, 1.0))))
        return Requests({}, {best.layer: count}, f"the loss stands still, and {best.layer} is full")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The policy of plain data.

        Raises:
            SurgeryError: It is none.
        """
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise SurgeryError(f"A policy has no {sorted(unknown)[0]!r}.")
        usual = cls()
        for name, value in data.items():
            kind = type(getattr(usual, name))
            fits = type(value) is kind or (kind is float and type(value) is int)
            if kind is type(None):  # a bound
                fits = value is None or type(value) is int
            if not fits:
                raise SurgeryError(f"{name} of a policy is not {value!r}.")
        return cls(**data)

"""Policies of the user's own: a function, or any object with `decide`, with the settings of a Policy around it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from tracker.errors import SurgeryError
from tracker.inputs.signature import Signature
from tracker.training.choices import Bypass, Candidate, Requests, Size
from tracker.training.policy import Phases, Policy
from tracker.training.subclasses import PASS_IT, name_of

# By name, those that are alive: nothing is imported or called because a file names it.
_known: dict[str, list[weakref.ref[Any]]] = {}


@dataclass(frozen=True, slots=True)
class OwnPolicy(Policy):
    """Settings of a policy, and what decides in its place.

    rule: `rule(candidates, now, losses, blocked)` → Requests, or None for nothing; or an object with such a `decide`.
        It is given those of `bypasses`, `inserted`, `step`, `looks_left` and `falling` that it names as keywords.
    """

    rule: Any = None

    def __post_init__(self) -> None:
        """Refuse what cannot decide."""
        Policy.__post_init__(self)
        if not callable(_function(self.rule)):
            raise SurgeryError(
                f"A rule is a function or an object with `decide`, not {self.rule!r}."
            )
        try:
            made = weakref.ref(self.rule)
        except TypeError:  # of what bears no weak reference a checkpoint cannot go on by itself
            return
        known = [ref for ref in _known.get(_name(self.rule), ()) if ref() not in (None, self.rule)]
        _known[_name(self.rule)] = [*known, made]

    def decide(
        self,
        candidates: Sequence[Candidate],
        now: Size,
        losses: Sequence[float],
        blocked: Mapping[str, int],
        *,
        bypasses: Sequence[Bypass] = (),
        inserted: int = 0,
        step: int = 0,
        looks_left: int | None = None,
        falling: float = 0.0,
    ) -> Requests:
        """What the rule wants.

        Raises:
            SurgeryError: It gave something else than Requests.
        """
        rule = _function(self.rule)
        known = {
            "bypasses": bypasses,
            "inserted": inserted,
            "step": step,
            "looks_left": looks_left,
            "falling": falling,
        }
        more = taken_by(rule, known)
        found = rule(candidates, now, losses, blocked, **more)
        if found is None:
            return Requests("nothing is to be done")
        if not isinstance(found, Requests):
            raise SurgeryError(
                f"A policy decides on tracker.Requests, or None for nothing; {_name(self.rule)} gave {found!r}."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; the rule by its name."""
        settings = {f.name: getattr(self, f.name) for f in fields(Policy)}
        return Policy(**settings).to_dict() | {"rule": _name(self.rule)}


def as_policy(policy: object) -> Policy | Phases:
    """A policy of what may be one: a Policy, Phases, a function, or an object with `decide`.

    Attributes of a function or an object that are called as settings of a Policy (`every`, `look`) are these.

    Raises:
        SurgeryError: It is none.
    """
    if isinstance(policy, Policy | Phases):
        return policy
    if not callable(_function(policy)) or isinstance(policy, type):
        raise SurgeryError(
            f"A policy is a Policy, Phases, a function, or an object with `decide`, not {policy!r}. Policy.from_dict "
            "makes one of plain data."
        )
    own = {f.name: getattr(policy, f.name, as_policy) for f in fields(Policy)}
    return OwnPolicy(rule=policy, **{n: v for n, v in own.items() if not callable(v)})


def rule_named(name: object) -> Any:
    """The function or object that a checkpoint names.

    Raises:
        SurgeryError: None of this name was made a policy in this process, or several were.
    """
    found = [rule for ref in _known.get(str(name), ()) if (rule := ref()) is not None]
    if not found:
        raise SurgeryError(f"The policy is {name}, which was not made a policy here. {PASS_IT}")
    # Of a function that was defined again, the last one; of others who knows.
    if len(found) > 1 and (not hasattr(found[-1], "__qualname__") or "<lambda>" in str(name)):
        raise SurgeryError(
            f"The policy is {name}, and there are {len(found)} of this name. {PASS_IT}"
        )
    return found[-1]


def taken_by(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a function takes."""
    signature = Signature(function)
    return {name: value for name, value in options.items() if signature.has(name)}


def _function(rule: object) -> Callable[..., Any]:
    return cast(Callable[..., Any], getattr(rule, "decide", rule))


def _name(rule: Any) -> str:
    return name_of(rule if hasattr(rule, "__qualname__") else type(rule))

"""What the fields of a policy may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tracker.errors import SurgeryError
from tracker.utils.argument_checks import described_type, fits, shown

# Field → least, most, and what it is. NaN is in no range.
RANGES: dict[str, tuple[float, float, str]] = {
    "warm_up": (0, 2**62, "a number of steps, 0 or more"),
    **dict.fromkeys(
        ("every", "look", "settle", "until"), (1, 2**62, "a number of steps, 1 or more")
    ),
    **dict.fromkeys(("floor", "ceiling"), (1, 2**62, "a number of units, 1 or more")),
    "insert": (0, 2**62, "a number of layers, 0 or more"),
    "newborn": (0, 2**62, "a number of looks, 0 or more"),
    "ramp": (1e-3, 1e3, "a power from 0.001 to 1000"),
    "dormant": (0, float("inf"), "a share of the mean activation, 0 or more"),
    "patience": (0, 2**62, "a number of looks, 0 or more"),
    "tolerance": (0, float("inf"), "a relative rise of the loss, 0 or more"),
    "drop": (0, float("inf"), "a relative error, 0 or more"),
    "regret": (0, float("inf"), "a relative rise of the loss, 0 or more"),
    "plateau": (0, 1, "a share from 0 to 1"),
    **dict.fromkeys(
        ("min_parameters", "max_parameters", "min_flops", "max_flops"),
        (0, float("inf"), "a number, 0 or more"),
    ),
}
MEANING = {"tolerance_of": "loss"}  # part of plain data: it used to be one of what layers compute
BOUNDS = (
    ("floor", "ceiling"),
    ("min_parameters", "max_parameters"),
    ("min_flops", "max_flops"),
    ("min_latency", "max_latency"),
)


def is_plain(value: object) -> bool:
    """Whether JSON gives a value back as it is."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def require_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """See that fields are of the kinds that they are declared to be.

    Raises:
        SurgeryError: One is not.
    """
    for name, value in values.items():
        if name in kinds and not fits(value, kinds[name]):
            raise SurgeryError(
                f"{name} of a policy is {described_type(kinds[name])}, not {shown(value)}."
            )


def require_meaning(data: dict[str, Any]) -> None:
    """Take MEANING out of a policy's plain data.

    Raises:
        SurgeryError: It is not there: the policy is of an older schema.
    """
    if data.pop("tolerance_of", None) != "loss" and "tolerance" in data:
        raise SurgeryError(
            f"This policy is of an older schema: its tolerance of {shown(data['tolerance'])} is a relative error of "
            "what layers compute, and is now a relative rise of the loss. Choose one anew (by default 0.001) and add "
            '"tolerance_of": "loss".'
        )


def require_sensible(policy: Any, kinds: Mapping[str, Any]) -> None:
    """See that a policy's fields mean something, each by itself and each with its counterpart.

    Raises:
        SurgeryError: One does not; the message says what it may be.
    """
    require_kinds({name: getattr(policy, name) for name in kinds}, kinds)
    for name, (least, most, what) in RANGES.items():
        value = getattr(policy, name)
        if value is not None and not least <= value <= most:
            raise SurgeryError(f"{name} of a policy is {what}, not {value!r}.")
    if not 0 < policy.at_most < 1:
        raise SurgeryError(f"at_most is a share between 0 and 1, not {policy.at_most!r}.")
    for bound in (policy.min_latency, policy.max_latency):
        if bound is not None and not bound > 0:
            raise SurgeryError(f"A latency is a number of milliseconds above 0, not {bound!r}.")
    for low, high in BOUNDS:
        least, most = getattr(policy, low), getattr(policy, high)
        if least is not None and most is not None and least > most:
            raise SurgeryError(
                f"A policy with {low} {least!r} and {high} {most!r} can do nothing: {low} is at most {high}."
            )

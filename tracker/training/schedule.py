"""When a run of a known length changes: shares of its steps."""

from __future__ import annotations

from typing import Any

from tracker.errors import SurgeryError

WARM_UP = 0.1  # before the first look: what has not learnt yet says little of what it will need
LAST = 0.75  # from here on nothing changes: what is new has a quarter of the run to settle
LOOKS = 12  # between these two
RAMP = 3.0  # of the way to a budget: large parts first
LEAST = 24  # steps of a run that can look, change and settle


def schedule(steps: int) -> dict[str, Any]:
    """The settings of a policy for a run of so many steps: `warm_up`, `every`, `look`, `settle` and `until`.

    A tenth of the run is left in peace at its beginning, and a quarter at its end; in between there are 12 looks, or as
    many as have room, over which the way to a budget is spread (`ramp`).

    Raises:
        SurgeryError: It is no whole number of steps, or too short to change in.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < LEAST:
        raise SurgeryError(f"A run that changes itself has {LEAST} steps or more, not {steps!r}.")
    warm_up, until = int(WARM_UP * steps), int(LAST * steps)
    every = max((until - warm_up) // LOOKS, 6)
    look = min(16, every // 3)
    settle = min(50, every - look)
    return {
        "warm_up": warm_up,
        "every": every,
        "look": look,
        "settle": settle,
        "until": until,
        "ramp": RAMP,
    }


def steps_for(policy: object, steps: float) -> int | None:
    """The steps that a run is fitted to which a framework starts: those that it takes, for no policy of the user's.

    Args:
        policy: As the user gave it.
        steps: That the framework is about to take; infinite or negative where it does not know.
    """
    return int(steps) if policy is None and LEAST <= steps < float("inf") else None

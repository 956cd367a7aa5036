"""What a network that still learns loses with units: what they do by now, and what they would have learnt."""

from __future__ import annotations

import math

from torch import Tensor

from tracker.training.choices import Candidate, Size
from tracker.training.verdict import standard_error

FEWEST = 4  # losses that tell whether they fall


def falling(losses: Tensor, steps: int) -> float:
    """Relative fall of the loss in the next `steps` steps at the pace of the last, beyond chance; 0 where it stands.

    Args:
        losses: Of the steps since the last look, (steps,). Their first half is compared with the second.
        steps: From one look to the next.
    """
    half = len(losses) // 2
    if len(losses) < FEWEST:
        return 0.0
    early, late = losses[:half].double(), losses[half:].double()
    chance = math.hypot(standard_error(early), standard_error(late))
    now, each = float(late.mean()), 2 / len(losses)
    fall = (float(early.mean()) - now - chance) * each * steps / max(abs(now), 1e-300)
    return max(fall, 0.0) if math.isfinite(fall) else 0.0


def weighed(
    errors: tuple[float, ...], going: tuple[int, ...], one: Candidate, now: Size, fall: float
) -> tuple[float, ...]:
    """The rises of the loss by units that go, as a network that still learns counts them.

    A young network computes little, so that most of its units cost next to nothing, and learn nevertheless.
    What goes costs its share of the loss, or of what its group does by now where that is less, and its share of what
    training gains up to the next look: each parameter is taken to gain as much as the others. Units that say nothing
    do not learn.

    Args:
        errors: Relative rises, once 1, 2, … are gone.
        going: These units, in this order.
        one: Their group.
        now: Size of the network.
        fall: As of `falling`.
    """
    worth = max(min(one.effect, 1.0), 1e-12)
    each, dead = fall * one.cost.parameters / max(now.parameters, 1.0), set(one.dead)
    found, learning = [], 0
    for error, unit in zip(errors, going, strict=False):
        learning += unit not in dead
        found.append(error / worth + each * learning)
    return tuple(found)

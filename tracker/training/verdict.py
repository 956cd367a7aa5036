"""Whether a change hurt: what it did to the loss at once, on the same samples, and whether training made up for it."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.parts.session import Transaction

SURE = 2.33  # standard errors: one in a hundred differences by chance is larger


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a change until its effect is measured.

    Attributes:
        step: After which it was made.
        loss: Mean of the last steps before it.
        groups: What it changed.
        change: The change itself; None where it cannot be taken back. It holds the model.
        entries: Length of the journal before it.
        error: Standard error of `loss`.
        rise: Relative rise of the loss by the change alone: see `rise_by`. None where it is not known.
    """

    step: int
    loss: float
    groups: tuple[str, ...]
    change: weakref.ref[Transaction] | None
    entries: int
    error: float = 0.0
    rise: float | None = None

    def hurt(self, after: float, error: float, regret: float, now: float | None = None) -> bool:
        """Whether the change is to be taken back.

        Args:
            after: Mean loss of the last steps.
            error: Its standard error.
            regret: Relative rise that is too much.
            now: Rise of the loss from before the change until now, on the samples that `rise` is of; None if unknown.

        Where it is known what the change alone did, on the same samples before and after, it is to blame if that was
        more than half of `regret`, and training has not made up for it on these. Else the loss must have risen by more
        than `regret`, and by more than chance: SURE standard errors of the difference.
        """
        if not math.isfinite(after):
            return True
        if self.rise is not None:
            still = after > self.loss if now is None else now > regret / 2
            return self.rise > regret / 2 and still
        difference = after - self.loss
        chance = SURE * math.hypot(error, self.error)
        return difference > max(regret * abs(self.loss), chance)


def standard_error(losses: Tensor) -> float:
    """Of their mean, taken for independent; 0 of fewer than three."""
    return float(losses.std() / math.sqrt(len(losses))) if len(losses) > 2 else 0.0


def rise_by(before: Tensor | None, after: Tensor | None) -> float | None:
    """Relative rise of the loss from that of the same samples before a change, (rows,) both; None if unknown.

    What is within chance (SURE standard errors of the paired differences) is none.
    """
    if before is None or after is None or before.shape != after.shape or not len(before):
        return None
    total, difference = float(before.sum()), after - before
    if not total > 0 or not bool(torch.isfinite(difference).all()):
        return None
    spread = float(difference.std()) * math.sqrt(len(difference)) if len(difference) > 2 else 0.0
    risen = float(difference.sum())
    return risen / total if risen > SURE * spread else 0.0

"""What a change is predicted to cost in the loss, and what was measured before anything was touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LossForecast:
    """In the loss that calibration was given, or that it stands in for.

    predicted_loss_change: From curvature and slope, over all consumers; None where no gradients were taken.
    loss: What it is measured in; None where it was not.
    loss_before, loss_after: On the batches that the candidates were tried on. Of a loss that is a change, before is 0.
    candidates: Each that was tried, and what was measured after it.
    """

    predicted_loss_change: float | None = None
    loss: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    candidates: Mapping[str, float] = field(default_factory=dict)

"""What a pass over activations leaves behind: nine numbers per neuron, and one formula, `merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tracker.utils.slotmap import SlotMap

# Rows of `Activity.table`. The first five simply add up.
OBSERVATIONS, FIRED, ZEROS, NONFINITE, BATCHES, MEAN, M2, MINIMUM, MAXIMUM = range(9)
ROWS = 9
FRESH = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, torch.inf, -torch.inf)


class ActivityValue(NamedTuple):
    """Readable statistics of each neuron: (neurons,) tensors, float64 or int64, on the CPU.

    A neuron without a single finite observation has NaN where a number would be a lie.
    """

    observations: Tensor  # finite values seen: what the means are over
    mean: Tensor
    variance: Tensor  # of the population (divided by n): 0 for a single observation
    minimum: Tensor
    maximum: Tensor
    firing_frequency: Tensor  # share of observations with |activation| > threshold
    zero_fraction: Tensor  # share of observations that are exactly zero
    nonfinite: Tensor  # NaN and infinite values: counted apart, part of nothing else
    batches: Tensor


@dataclass(frozen=True, slots=True)
class Activity:
    """Streamed statistics of the neurons of one layer; an algebra under `merge`.

    table: (9, neurons) float64, its rows named above. Counts are exact up to 2⁵³; M2 is the sum of squared
    deviations from the mean.
    """

    table: Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device | str = "cpu") -> Activity:
        """Nothing observed yet: the neutral element of `merge`."""
        fresh = torch.tensor(FRESH, dtype=torch.float64, device=device)
        return cls(fresh[:, None].expand(ROWS, neurons).contiguous())

    @property
    def neurons(self) -> int:
        """Slots of the layer."""
        return self.table.shape[1]

    def mean(self) -> Tensor:
        """Mean of each neuron: (neurons,) float64."""
        return self.table[MEAN]

    def merge(self, other: Activity) -> Activity:
        """Statistics of both samples together, slot by slot. Source: Chan, Golub & LeVeque (1983), eq. 2.1."""
        table = self.table + other.table  # right for all counts, and the first two terms of M2
        count, _, _, _, _, mean, m2, low, high = table.unbind(0)
        count_a, _, _, _, _, mean_a, _, low_a, high_a = self.table.unbind(0)
        count_b, _, _, _, _, mean_b, _, low_b, high_b = other.table.unbind(0)
        # Per slot: a fresh neuron starts at zero. The clamp keeps an empty slot empty.
        share = count_b / count.clamp(min=1)
        delta = mean_b - mean_a
        torch.addcmul(mean_a, delta, share, out=mean)
        m2.addcmul_(delta.square_().mul_(count_a), share)
        torch.minimum(low_a, low_b, out=low)
        torch.maximum(high_a, high_b, out=high)
        return Activity(table)

    @classmethod
    def fold(cls, tables: Tensor, dim: int) -> Activity:
        """`merge` of many at once: tables (9, …) along `dim`. The same formula, for any number of parts."""
        table = tables.sum(dim)
        n, mean, inner = tables[OBSERVATIONS], tables[MEAN], dim - 1
        total = table[OBSERVATIONS].clamp(min=1)
        table[MEAN] = (mean * n).sum(inner) / total
        between = (mean - table[MEAN].unsqueeze(inner)).square_().mul_(n)
        table[M2] += between.sum(inner)
        table[MINIMUM] = tables[MINIMUM].amin(inner)
        table[MAXIMUM] = tables[MAXIMUM].amax(inner)
        return cls(table)

    def remap(self, slots: SlotMap) -> Activity:
        """The same statistics after the layer's neurons were removed, added or reordered."""
        rows = zip(self.table, FRESH, strict=True)
        return Activity(torch.stack([slots.take(row, fill) for row, fill in rows]))

    def value(self) -> ActivityValue:
        """Read the statistics off. Moves to the CPU once."""
        table = self.table.cpu()
        n = torch.where(table[OBSERVATIONS] > 0, table[OBSERVATIONS], torch.nan)
        seen = 0 * n  # 0, or NaN where nothing was observed
        # Rounding, of merges too, must not give a constant a variance.
        constant = table[MINIMUM] == table[MAXIMUM]
        return ActivityValue(
            observations=table[OBSERVATIONS].long(),
            mean=table[MEAN] + seen,
            variance=torch.where(constant, 0.0, table[M2].clamp(min=0)) / n,
            minimum=table[MINIMUM] + seen,
            maximum=table[MAXIMUM] + seen,
            firing_frequency=table[FIRED] / n,
            zero_fraction=table[ZEROS] / n,
            nonfinite=table[NONFINITE].long(),
            batches=table[BATCHES].long(),
        )

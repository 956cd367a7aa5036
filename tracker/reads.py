"""What consumers were seen to read, by the keys of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tracker.slotmap import SlotMap
from tracker.statistics import Covariance


@dataclass(frozen=True, slots=True)
class Read:
    """What a consumer reads along dimension `dim` of its weight.

    taps: Columns of each feature, one behind the other: the places of a convolution's kernel, or 1.
    """

    dim: int
    covariance: Covariance
    taps: int = 1

    def reslot(self, slots: SlotMap) -> Read:
        """The same after columns were removed, added or reordered."""
        return Read(self.dim, self.covariance.reslot(slots.widened(self.taps)), self.taps)

    def columns(self, features: Iterable[int]) -> list[int]:
        """Columns of these features."""
        return [i * self.taps + t for i in features for t in range(self.taps)]

    def of_features(self) -> Covariance:
        """Covariance of the features at one place: the middle of the kernel."""
        if self.taps == 1:
            return self.covariance
        c = self.covariance
        at = torch.arange(self.taps // 2, len(c.mean), self.taps)
        return Covariance(c.count[at], c.mean[at], c.comoment[at[:, None], at])


def reslotted(
    reads: Mapping[str, Read], tensors: Mapping[str, Mapping[int, SlotMap]]
) -> dict[str, Read]:
    """What consumers read after slots of their weights moved; what some share, they go on sharing."""
    done: dict[tuple[int, SlotMap], Read] = {}
    found = {}
    for name, read in reads.items():
        slots = tensors.get(name, {}).get(read.dim)
        if slots is not None:
            key = (id(read.covariance), slots)
            if key not in done:
                done[key] = read.reslot(slots)
            read = Read(read.dim, done[key].covariance, read.taps)
        found[name] = read
    return found

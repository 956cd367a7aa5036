"""What consumers were seen to read, by the keys of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tracker.slotmap import SlotMap
from tracker.statistics import Covariance


class Later:
    """A covariance after its columns moved, made when it is first asked for.

    Of a large model all together take as much memory again, and mostly the next change is calibrated anew.
    """

    def __init__(self, source: Covariance | Later, slots: SlotMap) -> None:
        self._value: Covariance | None = None
        self._source: Covariance
        self._slots: SlotMap
        if isinstance(source, Later) and source._value is None:  # both moves at once
            self._source, self._slots = source._source, source._slots.then(slots)
        else:
            self._source = source.value() if isinstance(source, Later) else source
            self._slots = slots

    def value(self) -> Covariance:
        """The covariance, always the same object."""
        if self._value is None:
            self._value = self._source = self._source.reslot(self._slots)
        return self._value


@dataclass(frozen=True, slots=True)
class Read:
    """What a consumer reads along dimension `dim` of its weight.

    taps: Columns of each feature, one behind the other: the places of a convolution's kernel, or 1.
    """

    dim: int
    seen: Covariance | Later
    taps: int = 1

    @property
    def covariance(self) -> Covariance:
        """Of its columns."""
        return self.seen.value() if isinstance(self.seen, Later) else self.seen

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
    done: dict[tuple[int, SlotMap], Later] = {}
    found = {}
    for name, read in reads.items():
        slots = tensors.get(name, {}).get(read.dim)
        if slots is not None:
            later = done.setdefault(
                (id(read.seen), slots), Later(read.seen, slots.widened(read.taps))
            )
            read = Read(read.dim, later, read.taps)
        found[name] = read
    return found

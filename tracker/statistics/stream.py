"""Accumulates the `Activity` of one layer, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tracker.slotmap import SlotMap
from tracker.statistics.activity import Activity
from tracker.statistics.reduce import (
    Scratch,
    Sums,
    fold_maps,
    masked,
    masked_in_blocks,
    split_at,
    sums_of,
    tables_of,
)

# Batches whose sums wait to be merged together: merging one by one costs a small layer as much as reducing it.
PENDING = 16


class ActivityStream:
    """Statistics of a layer's neurons so far. Holds 9 numbers per neuron, and the sums of at most PENDING batches."""

    def __init__(self, neurons: int, threshold: float, device: torch.device | str = "cpu") -> None:
        self.threshold = threshold
        self._total = Activity.empty(neurons, device)
        self._pending: list[Sums] = []

    def add(self, output: Tensor, axis: int, scratch: Scratch) -> Sums | Activity | None:
        """Take one layer output in; return what was found in it, if all of it is finite.

        output: any shape and floating dtype; dimension `axis` counts the neurons, every index of the other
        dimensions is one observation. Fired means |a| > threshold.
        """
        # Detached, and all that follows is made from it: there is no graph that a no_grad would have to keep out.
        x = split_at(output.detach(), axis)
        if x.numel() == 0:
            return None
        if x.device.type != "cpu":
            self._merge(masked(x, self.threshold))
            return None
        sums = sums_of(x, self.threshold, scratch)
        if not sums.finite():
            self._merge(masked_in_blocks(x, self.threshold))
            return None
        if x.shape[2] > 1:
            batch = fold_maps(sums, x.shape)
            self._merge(batch)
            return batch
        self._pending.append(sums)
        if len(self._pending) == PENDING:
            self._flush()
        return sums

    def value(self) -> Activity:
        """What was observed so far, on the device of the activations."""
        self._flush()
        return self._total

    @classmethod
    def resumed(cls, value: Activity, threshold: float) -> ActivityStream:
        """A stream that goes on from what was observed."""
        stream = cls(value.table.shape[1], threshold)
        stream._total = value
        return stream

    def reslot(self, slots: SlotMap) -> ActivityStream:
        """A stream that goes on from here with neurons removed, added or reordered."""
        return ActivityStream.resumed(self.value().reslot(slots), self.threshold)

    def _flush(self) -> None:
        if self._pending:
            self._merge(Activity.fold(tables_of(self._pending), dim=1))
            self._pending = []

    def _merge(self, batch: Activity) -> None:
        # Replicas of one model may sit on several devices.
        home = self._total.table.device
        self._total = self._total.merge(Activity(batch.table.to(home)))


def observe(output: Tensor, axis: int, threshold: float, scratch: Scratch) -> Activity:
    """Statistics of a single layer output."""
    stream = ActivityStream(output.shape[axis], threshold, output.device)
    stream.add(output, axis, scratch)
    return stream.value()

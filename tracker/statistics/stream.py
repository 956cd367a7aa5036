"""Accumulates the `Activity` of one layer, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tracker.statistics.activity import Activity
from tracker.statistics.native import kernel, on_gpu
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
from tracker.utils.slotmap import SlotMap

# Batches whose sums wait to be merged together: merging one by one costs a small layer as much as reducing it.
PENDING = 16


class ActivityStream:
    """Statistics of a layer's neurons so far: 9 numbers per neuron.

    Compiled code merges an output into them in one call. Where torch does it, the sums of at most PENDING batches wait
    to be merged together.
    """

    def __init__(
        self,
        neurons: int,
        threshold: float,
        device: torch.device | str = "cpu",
        total: Activity | None = None,
    ) -> None:
        if total is None:
            # Outside any inference mode: tensors made inside could not be written outside.
            with torch.inference_mode(False):
                total = Activity.empty(neurons, device)
        self.threshold = threshold
        self._neurons = total.neurons
        self._pending: list[Sums] = []
        self._native = kernel() if total.table.device.type == "cpu" else None
        self._hold(total)

    def _hold(self, total: Activity) -> None:
        # Written in place by compiled code: nobody else may hold this table.
        self._total = total

    def add(self, output: Tensor, axis: int, scratch: Scratch, mean: bool = False) -> Tensor | None:
        """Take one layer output in; return its mean (neurons,) float64 if asked for, and if all of it is finite.

        output: any shape and floating dtype; dimension `axis` counts the neurons, every index of the other
        dimensions is one observation. Fired means |a| > threshold.
        """
        done, native = None, self._native
        if native is not None and output.is_cpu:
            means = torch.empty(self._neurons, dtype=torch.float64) if mean else None
            table = self._total.table
            done = native.add(output, axis, self._neurons, self.threshold, table, means)
            if done:
                return means
        if not output.numel():
            return None
        # Detached, and all that follows is made from it: there is no graph that a no_grad would have to keep out.
        x = split_at(output.detach(), axis)
        merge = on_gpu(x, self._total.table)
        if merge is not None:
            merge(x, self.threshold, self._total.table)
            return None
        if not x.is_cpu:
            self._merge(masked(x, self.threshold))
            return None
        sums = sums_of(x, self.threshold, scratch) if done is None else None
        if sums is None or not sums.finite():
            self._merge(masked_in_blocks(x, self.threshold))
            return None
        if x.shape[2] > 1:
            batch = fold_maps(sums, x.shape)
            self._merge(batch)
            return batch.mean()
        self._pending.append(sums)
        if len(self._pending) == PENDING:
            self._flush()
        return sums.mean() if mean else None

    def value(self) -> Activity:
        """What was observed so far, on the device of the activations."""
        self._flush()
        return Activity(self._total.table.clone())

    @classmethod
    def resumed(cls, value: Activity, threshold: float) -> ActivityStream:
        """A stream that goes on from what was observed."""
        with torch.inference_mode(False):
            total = Activity(value.table.clone(memory_format=torch.contiguous_format))
        return cls(total.neurons, threshold, total=total)

    def remap(self, slots: SlotMap) -> ActivityStream:
        """A stream that goes on from here with neurons removed, added or reordered."""
        return ActivityStream.resumed(self.value().remap(slots), self.threshold)

    def _flush(self) -> None:
        if self._pending:
            self._merge(Activity.fold(tables_of(self._pending), dim=1))
            self._pending = []

    def _merge(self, batch: Activity) -> None:
        # Replicas of one model may sit on several devices.
        home = self._total.table.device
        self._hold(self._total.merge(Activity(batch.table.to(home))))


def observe(output: Tensor, axis: int, threshold: float, scratch: Scratch) -> Activity:
    """Statistics of a single layer output."""
    stream = ActivityStream(output.shape[axis], threshold, output.device)
    stream.add(output, axis, scratch)
    return stream.value()

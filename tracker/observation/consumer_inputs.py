"""What consumers were seen to read, by the keys of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracker.statistics import Covariance
from tracker.utils.slotmap import SlotMap


class LazyCovariance:
    """A covariance after its columns moved, made when it is first asked for.

    Of a large model all together take as much memory again, and mostly the next change is calibrated anew.
    """

    def __init__(self, source: Covariance | LazyCovariance, slots: SlotMap) -> None:
        self._source, self._slots = source, slots
        if isinstance(source, LazyCovariance):  # several moves are made as one
            self._source, self._slots = source.after(slots)
        self._value: Covariance | None = None

    def value(self) -> Covariance:
        """The covariance, always the same object."""
        if self._value is None:
            source = self._source
            whole = source.value() if isinstance(source, LazyCovariance) else source
            self._value = self._source = whole.remap(self._slots)
        return self._value

    def after(self, slots: SlotMap) -> tuple[Covariance | LazyCovariance, SlotMap]:
        """What it would be made of after one more move: a covariance, and the slots that it is moved by."""
        if self._value is not None:
            return self._value, slots
        return self._source, self._slots.then(slots)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How the loss depends on what a consumer puts out, as a mean over batches.

    curvature: (outputs, outputs), or (outputs,) the diagonal.
    across: Dimension of the consumer's weight along its outputs.
    slope: Gradient of the loss by its weight as a matrix, inputs centred where a bias can hold their mean:
        (outputs · places, columns). None where it is not known, and zero where the loss is the change itself.
    """

    curvature: Tensor
    across: int
    slope: Tensor | None = None

    def remapped(self, dims: Mapping[int, SlotMap]) -> Sensitivity:
        """After slots of the weight moved. The slope is that of another network then."""
        bent, outputs = self.curvature, dims.get(self.across)
        if outputs is not None:
            for dim in range(bent.ndim):
                bent = outputs.take(bent, fill=0, dim=dim)
        return Sensitivity(bent, self.across)


@dataclass(frozen=True, slots=True)
class ConsumerInput:
    """What a consumer reads along dimension `dim` of its weight.

    kernel_positions: Columns of each feature, side by side: the positions of a convolution's kernel, or 1.
    loss: How the loss depends on what the consumer puts out; None where no gradients were taken.
    """

    dim: int
    seen: Covariance | LazyCovariance
    kernel_positions: int = 1
    loss: Sensitivity | None = None

    @property
    def covariance(self) -> Covariance:
        """Of its columns."""
        return self.seen.value() if isinstance(self.seen, LazyCovariance) else self.seen

    def columns(self, features: Iterable[int]) -> list[int]:
        """Columns of these features."""
        return [
            i * self.kernel_positions + t for i in features for t in range(self.kernel_positions)
        ]

    def of_features(self) -> Covariance:
        """Covariance of the features at one place: the middle of the kernel."""
        if self.kernel_positions == 1:
            return self.covariance
        c = self.covariance
        at = torch.arange(self.kernel_positions // 2, len(c.mean), self.kernel_positions)
        return Covariance(c.count[at], c.mean[at], c.comoment[at[:, None], at])


def remapped(
    reads: Mapping[str, ConsumerInput], tensors: Mapping[str, Mapping[int, SlotMap]]
) -> dict[str, ConsumerInput]:
    """What consumers read after slots of their weights moved; what some share, they go on sharing."""
    done: dict[tuple[int, SlotMap], LazyCovariance] = {}
    found = {}
    for name, read in reads.items():
        slots = tensors.get(name, {}).get(read.dim)
        if slots is not None:
            later = done.setdefault(
                (id(read.seen), slots),
                LazyCovariance(read.seen, slots.widened(read.kernel_positions)),
            )
            read = replace(read, seen=later)
        if read.loss is not None and name in tensors:
            read = replace(read, loss=read.loss.remapped(tensors[name]))
        found[name] = read
    return found

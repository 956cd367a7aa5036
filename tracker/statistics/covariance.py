"""Streamed covariance of a layer's neurons: all pairs, no sampling, no stored activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.slotmap import SlotMap

# Rows that one fp32 product may add up: fp32 loses about one digit for each factor of 10 in a sum of one sign, and
# correlations near 1 (after a ReLU, say) show it. Beyond, float64 adds.
PRODUCT_ROWS = 128
# Up to here a product is so short that float64 throughout costs little.
NARROW = 128
# Adding (neurons, neurons) in float64 is bound by memory: wide layers first add a few products in fp32.
WIDE = 1024
WIDE_ROWS = 2048
TRIANGULAR_FROM = 512  # neurons from which on only the upper block triangle is computed
TRIANGLE_BLOCKS = 8
TILE = 512


@dataclass(frozen=True, slots=True)
class Covariance:
    """Co-moments of the neurons of one layer; an algebra under `merge`.

    count:    (neurons,) int64. Fewer than `Activity.observations` where non-finite values were left out, and for
              neurons that joined later. A pair with unequal counts has not seen the same stream, and has no
              correlation.
    mean:     (neurons,) float64
    comoment: (neurons, neurons) float64: Σ (x - mean)(x - mean)ᵀ
    """

    count: Tensor
    mean: Tensor
    comoment: Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device | str = "cpu") -> Covariance:
        """Nothing observed yet: the neutral element of `merge`."""
        return cls(
            torch.zeros(neurons, dtype=torch.int64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros((neurons, neurons), dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, sample: Tensor) -> Covariance:
        """sample: (observations, neurons)."""
        stream = CovarianceStream(sample.shape[1], sample.device)
        stream.add(sample)
        return stream.value()

    def merge(self, other: Covariance) -> Covariance:
        """Co-moments of both samples together. Source: Chan, Golub & LeVeque (1983), for pairs."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count.double() / count.clamp(min=1)
        # One row per merge: for pairs with equal counts its outer product is δᵢδⱼ·n·m/(n+m).
        row = delta * (self.count * share).sqrt()
        comoment = self.comoment + other.comoment + torch.outer(row, row)
        return Covariance(count, self.mean + delta * share, comoment)

    def reslot(self, slots: SlotMap) -> Covariance:
        """The same co-moments after neurons were removed, added or reordered."""
        return Covariance(
            slots.take(self.count, fill=0),
            slots.take(self.mean, fill=0.0),
            slots.take(slots.take(self.comoment, fill=0.0), fill=0.0, dim=1),
        )

    def deviation(self) -> Tensor:
        """Standard deviation of each neuron, NaN for constant ones: (neurons,) float64."""
        std = (self.comoment.diagonal() / self.count.clamp(min=1)).clamp(min=0).sqrt()
        noise = torch.finfo(torch.float32).eps * self.mean.abs()  # activations carry fp32 rounding
        return torch.where((std > noise) & (self.count > 1), std, torch.nan)

    def correlation(self, rows: slice = slice(None)) -> Tensor:
        """Pearson correlations (rows, neurons), float64; NaN where a neuron is constant or a pair not comparable."""
        scale = self.deviation().reciprocal()
        r = self.comoment[rows] * scale[rows, None] * scale / self.count.clamp(min=1)
        # Pairs that did not see the same stream have nothing to compare.
        return r.clamp_(-1, 1).masked_fill_(self.count[rows, None] != self.count, torch.nan)

    def pairs_above(self, threshold: float) -> list[tuple[int, int, float]]:
        """All pairs i < j with |correlation| ≥ threshold, as (i, j, correlation), in order of i, j.

        Searched tile by tile: no second (neurons, neurons) matrix is made.
        """
        found = []
        for start in range(0, self.count.numel(), TILE):
            r = self.correlation(slice(start, start + TILE))
            hits = (r.abs() >= threshold).triu_(start + 1).nonzero()
            values = r[hits[:, 0], hits[:, 1]].tolist()
            found += [(start + i, j, v) for (i, j), v in zip(hits.tolist(), values, strict=True)]
        return found


class CovarianceStream:
    """Accumulates a `Covariance` at the speed of one matrix product over the rows.

    Rows are centred on the mean of their own batch; one more row carries the distance between the batch's mean and
    the stream's (the Chan term). So fp32 products see small numbers, whatever the mean and however it drifts.
    """

    def __init__(self, neurons: int, device: torch.device | str = "cpu") -> None:
        rows = PRODUCT_ROWS if neurons <= WIDE else WIDE_ROWS
        dtype = torch.float64 if neurons <= NARROW else torch.float32
        # Allocated here, outside any inference mode: tensors made inside could not be written outside.
        with torch.inference_mode(False):
            self._total = Covariance.empty(neurons, device)
            self._partial = torch.zeros((neurons, neurons), dtype=dtype, device=device)
            self._stage = torch.zeros((rows, neurons), dtype=dtype, device=device)
        self._staged = 0

    @torch.no_grad()
    def add(self, rows: Tensor, mean: Tensor | None = None) -> None:
        """rows: (observations, neurons), any strides; mean: their float64 mean, when it is known and finite.

        Of a batch with non-finite values the rows are left out in which most neurons are not finite (a broken
        sample), and of the rest the neurons that still are not (a broken neuron).
        """
        rows = rows.detach()
        if mean is None:
            # Left out as zeros after centring, so that no step waits for the device.
            finite = rows.isfinite()
            whole = 2 * finite.sum(1, keepdim=True) > rows.shape[1]
            sound = (finite | ~whole).all(0)
            kept = whole & sound
            n = whole.sum() * sound
            rows = torch.where(kept, rows, 0).double()
            mean = rows.sum(0) / n.clamp(min=1)
            rows = torch.where(kept, rows, mean)
        else:
            n = torch.tensor(rows.shape[0], device=rows.device)
        self._stage_row(self._advance(n, mean))
        self._stage_centred(rows, mean)

    def _advance(self, n: Tensor, mean: Tensor) -> Tensor:
        """Take `n` rows (of all neurons, or of each) with `mean` in; return the Chan row (neurons,)."""
        old = self._total
        count = old.count + n
        delta = torch.where(n > 0, mean - old.mean, 0.0)
        share = n.double() / count.clamp(min=1)
        self._total = Covariance(count, old.mean + delta * share, old.comoment)
        return delta * (old.count * share).sqrt()

    def _stage_row(self, row: Tensor) -> None:
        self._stage[self._staged].copy_(row)
        self._staged += 1
        if self._staged == len(self._stage):
            self._flush()

    def _stage_centred(self, rows: Tensor, mean: Tensor) -> None:
        # The mean in two fp32 parts: x - high is exact where it matters, low takes the rest away.
        high = mean.to(torch.promote_types(rows.dtype, torch.float32))
        low = (mean - high).to(self._stage.dtype)
        start = 0
        while start < rows.shape[0]:
            take = min(len(self._stage) - self._staged, rows.shape[0] - start)
            target = self._stage[self._staged : self._staged + take]
            target.copy_(rows[start : start + take] - high).sub_(low)
            start, self._staged = start + take, self._staged + take
            if self._staged == len(self._stage):
                self._flush()

    def _flush(self) -> None:
        """Multiply the staged rows out, the upper block triangle only. In-place products are not autocast."""
        neurons, total = self._partial.shape[0], self._total.comoment
        width = neurons if neurons < TRIANGULAR_FROM else -(-neurons // TRIANGLE_BLOCKS)
        with _full_precision():
            for i in range(0, neurons if self._staged else 0, width):
                target = self._partial[i : i + width, i:]
                for k, block in enumerate(self._stage[: self._staged].split(PRODUCT_ROWS)):
                    left = block[:, i : i + width].T
                    target.addmm_(left, block[:, i:], beta=1 if k else 0)
                total[i : i + width, i:].add_(target)
        self._staged = 0

    @torch.no_grad()
    def value(self) -> Covariance:
        """What was observed so far, on the CPU."""
        self._flush()
        upper = self._total.comoment.cpu().triu()
        comoment = upper + upper.triu(1).T
        return Covariance(self._total.count.cpu(), self._total.mean.cpu(), comoment)

    @classmethod
    def resumed(cls, value: Covariance, device: torch.device | str = "cpu") -> CovarianceStream:
        """A stream that goes on from what was observed."""
        stream = cls(len(value.mean), device)
        stream._total = Covariance(
            *(t.to(device) for t in (value.count, value.mean, value.comoment))
        )
        return stream

    def reslot(self, slots: SlotMap) -> CovarianceStream:
        """A stream that goes on from here with neurons removed, added or reordered."""
        return CovarianceStream.resumed(self.value().reslot(slots), self._partial.device)


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32: the user may have allowed TF32 or bf16 for the model's own."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)

"""Streamed covariance of a layer's neurons: all pairs, no sampling, no stored activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.statistics.native import kernel
from tracker.statistics.native.products import NativeProducts
from tracker.statistics.products import TorchProducts
from tracker.statistics.reduce import split_at
from tracker.utils.slotmap import SlotMap

TILE = 64  # rows of pairs that are searched together: they stay in cache


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

    def remap(self, slots: SlotMap) -> Covariance:
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
        scale, count = self.deviation().reciprocal(), self.count.double()
        # Of |co-moment|, in deviations of the other neuron.
        bound = (threshold * (1 - 1e-12)) * count / scale
        i, j = self._near(scale, bound).unbind(1)
        r = (self.comoment[i, j] * scale[i] * scale[j] / count[i]).clamp_(-1, 1)
        kept = (r.abs() >= threshold) & (count[i] == count[j])  # others did not see the same stream
        return list(zip(i[kept].tolist(), j[kept].tolist(), r[kept].tolist(), strict=True))

    def _near(self, scale: Tensor, bound: Tensor) -> Tensor:
        """Pairs i < j with |co-moment| · scale[j] ≥ bound[i]: (pairs, 2)."""
        native = kernel() if scale.device.type == "cpu" else None
        if native is not None and self.comoment.is_contiguous():
            return native.pairs(self.comoment, scale.contiguous(), bound.contiguous())
        size, found = scale.numel(), []
        work = torch.empty(TILE * size, dtype=torch.float64, device=scale.device)
        for start in range(0, size, TILE):
            block = self.comoment[start : start + TILE, start:]
            tile = torch.mul(block, scale[start:], out=work[: block.numel()].view(block.shape))
            pairs = (tile.abs_() >= bound[start : start + TILE, None]).nonzero() + start
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
        return torch.cat(found) if found else torch.zeros((0, 2), dtype=torch.int64)


ENOUGH = 64  # rows that a sample is worth its costs for
GOLDEN = 0.6180339887498949  # its multiples, without their integers, meet all parts of an interval, in no rhythm


class CovarianceStream:
    """Accumulates a `Covariance` at the speed of one matrix product over the rows.

    Rows are centred on the mean of their own batch; one more row carries the distance between the batch's mean and
    the stream's (the Chan term). So fp32 products see small numbers, whatever the mean and however it drifts.
    """

    def __init__(
        self, neurons: int, device: torch.device | str = "cpu", total: Covariance | None = None
    ) -> None:
        if total is None:
            total = Covariance.empty(neurons, device)
        native = kernel() if total.mean.device.type == "cpu" else None
        # Outside any inference mode: tensors made inside could not be written outside.
        with torch.inference_mode(False):
            own = [
                t.clone(memory_format=torch.contiguous_format)
                for t in (total.count, total.mean, total.comoment)
            ]
            self._products: NativeProducts | TorchProducts = (
                TorchProducts(*own) if native is None else NativeProducts(native, *own)
            )

    @torch.no_grad()
    def add(self, output: Tensor, mean: Tensor | None = None, axis: int = -1) -> None:
        """Take one layer output in.

        output: any shape and floating dtype; dimension `axis` counts the neurons. mean: of each neuron, (neurons,)
        float64, when it is known and finite.

        Of a batch with non-finite values the rows are left out in which most neurons are not finite (a broken
        sample), and of the rest the neurons that still are not (a broken neuron).
        """
        x = split_at(output.detach(), axis)
        if not x.numel():
            return
        if mean is None:
            own = x.mean((0, 2), dtype=torch.float64)
            mean = own if bool(own.isfinite().all()) else None
        if mean is not None and self._products.add(x, mean):
            return
        # Left out as zeros after centring, so that no step waits for the device.
        rows = x.transpose(1, 2).flatten(0, 1)
        finite = rows.isfinite()
        whole = 2 * finite.sum(1, keepdim=True) > rows.shape[1]
        sound = (finite | ~whole).all(0)
        kept = whole & sound
        n = whole.sum() * sound
        rows = torch.where(kept, rows, 0).double()
        mean = rows.sum(0) / n.clamp(min=1)
        self._products.add_centred(torch.where(kept, rows - mean, 0), mean, n)

    @torch.no_grad()
    def add_some(
        self, output: Tensor, axis: int, step: int, turn: int, mean: Tensor | None = None
    ) -> None:
        """Take one row of `step` of a layer output in; others at each `turn`, so that none is left out for ever.

        Rows are samples where there are enough of them, else positions. Of an output that would give fewer than
        ENOUGH, all rows at one turn of `step`, each time another: to take a few in costs as much as many.
        mean: As in `add`.
        """
        x = split_at(output.detach(), axis)
        outer, _, inner = x.shape
        if outer * inner < ENOUGH * step or step > max(outer, inner):
            block, place = divmod(turn, step)
            if place == int(block * GOLDEN % 1 * step):
                self.add(x, mean, axis=1)
            return
        first = turn % step
        x = x[first::step] if outer >= step else x[:, :, first::step]
        self.add(x, axis=1)

    @torch.no_grad()
    def value(self) -> Covariance:
        """What was observed so far, on the CPU."""
        count, mean, total = self._products.totals()
        upper = total.cpu().triu()
        return Covariance(count.cpu().clone(), mean.cpu().clone(), upper + upper.triu(1).T)

    @classmethod
    def resumed(cls, value: Covariance, device: torch.device | str = "cpu") -> CovarianceStream:
        """A stream that goes on from what was observed."""
        parts = (t.to(device) for t in (value.count, value.mean, value.comoment))
        return cls(len(value.mean), device, Covariance(*parts))

    def remap(self, slots: SlotMap) -> CovarianceStream:
        """A stream that goes on from here with neurons removed, added or reordered."""
        return CovarianceStream.resumed(self.value().remap(slots), self._products.device)

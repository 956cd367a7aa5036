"""Sums of products of all pairs of neurons, by torch: rows are centred, staged, and multiplied out together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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


class TorchProducts:
    """Rows on their way into sums of products, by torch."""

    def __init__(self, count: Tensor, mean: Tensor, total: Tensor) -> None:
        neurons, self.device = len(mean), mean.device
        rows = PRODUCT_ROWS if neurons <= WIDE else WIDE_ROWS
        dtype = torch.float64 if neurons <= NARROW else torch.float32
        self._count, self._mean, self._total = count, mean, total
        self._partial = torch.zeros((neurons, neurons), dtype=dtype, device=self.device)
        self._stage = torch.zeros((rows, neurons), dtype=dtype, device=self.device)
        self._staged = 0

    def add(self, x: Tensor, mean: Tensor) -> bool:
        """X (outer, neurons, inner), all of it finite, and its mean."""
        rows = x.transpose(1, 2).flatten(0, 1)
        self._stage_row(self._advance(torch.tensor(len(rows), device=x.device), mean))
        # The mean in two fp32 parts: x - high is exact where it matters, low takes the rest away.
        high = mean.to(torch.promote_types(rows.dtype, torch.float32))
        self._stage_rows(rows, high, (mean - high).to(self._stage.dtype))
        return True

    def add_centred(self, rows: Tensor, mean: Tensor, n: Tensor) -> None:
        """Rows minus their mean; zeros in the place of what is left out, n (neurons,) is what is not."""
        self._stage_row(self._advance(n, mean))
        zero = torch.zeros((), dtype=self._stage.dtype, device=self.device)
        self._stage_rows(rows, zero, zero)

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean, and sums of products, of which the upper triangle holds."""
        self._flush()
        return self._count, self._mean, self._total

    def _advance(self, n: Tensor, mean: Tensor) -> Tensor:
        """Take `n` rows (of all neurons, or of each) with `mean` in; return the Chan row (neurons,)."""
        before, self._count = self._count, self._count + n
        delta = torch.where(n > 0, mean - self._mean, 0.0)
        share = n.double() / self._count.clamp(min=1)
        self._mean = self._mean + delta * share
        return delta * (before * share).sqrt()

    def _stage_row(self, row: Tensor) -> None:
        self._stage[self._staged].copy_(row)
        self._staged += 1
        if self._staged == len(self._stage):
            self._flush()

    def _stage_rows(self, rows: Tensor, high: Tensor, low: Tensor) -> None:
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
        neurons, total = self._partial.shape[0], self._total
        width = neurons if neurons < TRIANGULAR_FROM else -(-neurons // TRIANGLE_BLOCKS)
        with _full_precision():
            for i in range(0, neurons if self._staged else 0, width):
                target = self._partial[i : i + width, i:]
                for k, block in enumerate(self._stage[: self._staged].split(PRODUCT_ROWS)):
                    left = block[:, i : i + width].T
                    target.addmm_(left, block[:, i:], beta=1 if k else 0)
                total[i : i + width, i:].add_(target)
        self._staged = 0


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

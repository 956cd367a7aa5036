"""Sums of products of all pairs of neurons, by compiled code."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from tracker.errors import StatisticsError
from tracker.statistics.native.calls import TYPES, Kernel, require
from tracker.statistics.products import NARROW

CAPACITY = 512  # rows that are multiplied out together
DOUBLE = 3  # code of float64, which precise streams take
PARALLEL = 256  # neurons from which on torch's threads share the work


class Stream(ctypes.Structure):
    """The state, as in covariance.cpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("neurons", "capacity", "staged", "precise")),
        *((name, ctypes.c_void_p) for name in ("count", "mean", "stage", "total")),
    ]


class NativeProducts:
    """Rows on their way into sums of products. The tensors given are written in place."""

    def __init__(self, native: Kernel, count: Tensor, mean: Tensor, total: Tensor) -> None:
        self.device = mean.device
        self._native, self._neurons = native, len(mean)
        precise = self._neurons <= NARROW
        columns = native.width() * (1 if precise else 2)
        self._count, self._mean, self._total = count, mean, total
        self._require()
        self._types = {**TYPES, torch.float64: DOUBLE} if precise else TYPES
        dtype = torch.float64 if precise else torch.float32
        self._stage = torch.zeros(-(-self._neurons // columns), CAPACITY, columns, dtype=dtype)
        places = (t.data_ptr() for t in (count, mean, self._stage, total))
        self._stream = Stream(self._neurons, CAPACITY, 0, int(precise), *places)
        self._address = ctypes.addressof(self._stream)

    def _require(self) -> None:
        size = self._neurons
        require(self._count, torch.int64, (size,))
        require(self._mean, torch.float64, (size,))
        require(self._total, torch.float64, (size, size))

    def add(self, x: Tensor, mean: Tensor) -> bool:
        """X (outer, neurons, inner), all of it finite, and its mean. False: not for this type."""
        code = self._types.get(x.dtype)
        if code is None or type(x) is not Tensor or x.is_neg():
            return False
        self._add(x, code, mean, None)
        return True

    def add_centred(self, rows: Tensor, mean: Tensor, n: Tensor) -> None:
        """Rows minus their mean; zeros in the place of what is left out, n (neurons,) is what is not."""
        rows = rows.to(self._stage.dtype)
        self._add(rows[:, :, None], self._types[rows.dtype], mean, n.contiguous())

    def _add(self, x: Tensor, code: int, mean: Tensor, n: Tensor | None) -> None:
        outer, neurons, inner = x.shape
        mean = mean.contiguous()
        self._require()
        require(mean, torch.float64, (neurons,))
        if n is not None:
            require(n, torch.int64, (neurons,))
        if neurons != self._neurons or not x.is_cpu:
            raise StatisticsError(
                f"Sums of products of {self._neurons} neurons cannot take {neurons} in."
            )
        places = [t.data_ptr() for t in (self._count, self._mean, self._stage, self._total)]
        stream = self._stream
        stream.count, stream.mean, stream.stage, stream.total = places
        if x.stride(1) != inner or (inner > 1 and x.stride(2) != 1):
            x = x.contiguous()
        self._native.stage(
            self._address,
            x.data_ptr(),
            code,
            outer,
            inner,
            x.stride(0),
            mean.data_ptr(),
            None if n is None else n.data_ptr(),
            self._threads(),
            self._native.fork,
        )

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean, and sums of products, of which the upper triangle holds."""
        self._require()
        self._native.flush(self._address, self._threads(), self._native.fork)
        return self._count, self._mean, self._total

    def _threads(self) -> int:
        return torch.get_num_threads() if self._neurons >= PARALLEL and self._native.fork else 1

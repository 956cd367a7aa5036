"""Calls of the compiled code: each table that it reads or writes is checked first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tracker.errors import StatisticsError
from tracker.statistics.activity import ROWS
from tracker.statistics.reduce import split_at

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARALLEL = 1 << 18  # values from which on torch's threads share the work


class Kernel(NamedTuple):
    """The compiled functions, and where torch keeps its threads (None: one thread does all)."""

    reduce: Callable[..., int]
    stage: Callable[..., None]
    flush: Callable[..., None]
    search: Callable[..., int]
    width: Callable[[], int]  # fp32 lanes of a vector
    fork: int | None

    def add(
        self,
        output: Tensor,
        axis: int,
        neurons: int,
        threshold: float,
        table: Tensor,
        mean: Tensor | None,
    ) -> bool | None:
        """Merge one CPU output into a table (9, neurons) float64.

        mean: (neurons,) float64 that receives the output's means, or None.
        True: done. False: nothing was written, values are not finite or too large. None: not for this tensor.

        Raises:
            StatisticsError: The table or `mean` is another one than the code writes to.
        """
        require(table, torch.float64, (ROWS, neurons))
        if mean is not None:
            require(mean, torch.float64, (neurons,))
        # Called for each layer of each pass: every line here is a part of a training step.
        code = TYPES.get(output.dtype)
        size = output.numel()
        if code is None or not size or type(output) is not Tensor or output.is_neg():
            return None
        if not output.is_cpu or output.shape[axis] != neurons:
            return None
        if neurons > 1 and output.is_contiguous():
            inner = output.stride(axis)
            stride = neurons * inner
            outer = size // stride
        else:
            output = split_at(output.detach(), axis)
            outer, _, inner = output.shape
            if output.stride(1) != inner or (inner > 1 and output.stride(2) != 1):
                output = output.contiguous()
            stride = output.stride(0)
        address = output.data_ptr()
        if not address:
            return None
        threads = torch.get_num_threads() if size >= PARALLEL and self.fork else 1
        to, means = table.data_ptr(), None if mean is None else mean.data_ptr()
        done = self.reduce(
            address, code, outer, neurons, inner, stride, threshold, to, means, threads, self.fork
        )
        return None if done == 2 else done == 0

    def pairs(self, products: Tensor, scale: Tensor, bound: Tensor) -> Tensor:
        """Pairs i < j with |products[i, j]| · scale[j] ≥ bound[i]: (pairs, 2) int64, in order of i, j.

        products: (neurons, neurons), scale and bound: (neurons,), float64 and contiguous, on the CPU.
        """
        size = len(scale)
        require(products, torch.float64, (size, size))
        require(scale, torch.float64, (size,))
        require(bound, torch.float64, (size,))
        room = 4096
        while True:
            found = torch.empty((room, 2), dtype=torch.int64)
            places = [t.data_ptr() for t in (scale, bound, found)]
            count = self.search(products.data_ptr(), size, *places, room)
            if count <= room:
                return found[:count]
            room = count


def require(table: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: str = "cpu") -> None:
    """Refuse a table that compiled code would read or write beyond its end.

    Raises:
        StatisticsError: It is of another type or shape, not contiguous, or lies elsewhere.
    """
    if (
        table.dtype != dtype
        or table.shape != shape
        or not table.is_contiguous()
        or table.device.type != device
    ):
        raise StatisticsError(
            f"A table of statistics is {tuple(table.shape)} {table.dtype} on {table.device}"
            f"{'' if table.is_contiguous() else ', not contiguous'}; compiled code takes {shape} {dtype} on {device}. "
            "Begin a new window with start_tracking()."
        )

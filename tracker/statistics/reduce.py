"""One pass over a layer's output, with the few torch reductions that are fast on a CPU.

On CPU tensors `var_mean`, `aminmax`, `vector_norm` and sums of bools along dim 0 run scalar code, 15 to 60
times slower than a plain sum. So everything here is `sub`, `mul`, `abs`, `gt`, `eq`, `sum`, `amin` and `amax` on blocks
that stay in cache, in fp32, folded into float64 afterwards.

Numerics: values are shifted by K, a mean over part (or all) of the batch's own rows, before they are squared, and
M2 = Σ(x-K)² - (Σ(x-K))²/n. With K over m of n rows, (K-mean)² ≤ variance·n/m (Cauchy-Schwarz), so cancellation
costs at most a factor 1 + n/m (here 8) of fp32's rounding; a shift fixed once per stream has no such bound.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.statistics.activity import (
    BATCHES,
    FIRED,
    M2,
    MEAN,
    MINIMUM,
    OBSERVATIONS,
    ROWS,
    ZEROS,
    Activity,
)

BLOCK = (
    1 << 18
)  # elements, 1 MiB of fp32: smaller blocks stay in L2, but the calls then cost more than that gains
SHIFT_STRIDE = (
    7  # rows that the shift is taken from: odd, so that it does not alias with sequence lengths
)
WIDE_MAP = 64  # positions from which on a channels-first map is reduced along its rows


class Scratch(threading.local):
    """Reused work space, one for each thread that runs forward passes."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised tensor of `shape` on the device of `like`; the next call may reuse it."""
        size = math.prod(shape)
        key = (like.device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Inside inference mode a new tensor could never again be written outside of it.
            with torch.inference_mode(False):
                buffer = torch.empty(max(size, BLOCK), dtype=dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:size].view(shape)


@dataclass(frozen=True, slots=True)
class Sums:
    """What one pass over a batch of `n` values per slot found, in the dtype of the pass.

    parts: (6, slots): sums of x - shift, of its square, of |x| > threshold, of x = 0; minimum; maximum
    shift: (slots,)
    """

    parts: Tensor
    shift: Tensor
    n: int

    def finite(self) -> bool:
        """False for NaN and infinite values, and for values too large to be squared in fp32."""
        return math.isfinite(self.parts.sum())

    def mean(self) -> Tensor:
        """Mean of each slot, float64."""
        return self.shift + self.parts[0].double() / self.n


def tables_of(batches: Sequence[Sums]) -> Tensor:
    """Tables of several batches: (9, batches, slots) float64."""
    parts = torch.stack([b.parts for b in batches], 1).double()
    shift = torch.stack([b.shift for b in batches]).double()
    n = torch.tensor([b.n for b in batches], dtype=torch.float64)[:, None]
    tables = torch.zeros((ROWS, *shift.shape), dtype=torch.float64)
    tables[OBSERVATIONS] = n
    tables[BATCHES] = 1
    tables[FIRED : ZEROS + 1] = parts[2:4]
    tables[MEAN] = shift + parts[0] / n
    tables[M2] = (parts[1] - parts[0].square() / n).clamp_(min=0)
    tables[MINIMUM:] = parts[4:]
    return tables


def sums_of(x: Tensor, threshold: float, scratch: Scratch) -> Sums:
    """X (outer, neurons, inner) on the CPU → sums, a slot for each neuron, or for each of its maps' rows or columns."""
    outer, neurons, inner = x.shape
    if inner >= WIDE_MAP:
        return _reduce_rows(x.reshape(outer * neurons, inner), threshold, scratch)
    return _reduce_columns(x.reshape(outer, neurons * inner), threshold, scratch)


def fold_maps(sums: Sums, shape: torch.Size) -> Activity:
    """Sums over the maps of one batch x (outer, neurons, inner) → `Activity` of the neurons."""
    outer, neurons, inner = shape
    table = tables_of([sums])[:, 0]
    if inner >= WIDE_MAP:
        folded = Activity.fold(table.view(ROWS, outer, neurons), dim=1)
    else:
        folded = Activity.fold(table.view(ROWS, neurons, inner), dim=2)
    folded.table[BATCHES].fill_(1)
    return folded


def split_at(x: Tensor, axis: int) -> Tensor:
    """`x` as (outer, neurons, inner), without a copy where its memory layout allows one view.

    All but the neurons' dimension are observations, whose order does not matter: they are taken in the order of
    memory. So a transposed or channels_last tensor needs no copy.
    """
    axis %= x.ndim
    if axis == x.ndim - 1 and x.is_contiguous():  # most layers
        return x.view(-1, x.shape[axis], 1)
    strides = x.stride()
    rest = sorted((d for d in range(x.ndim) if d != axis), key=lambda d: -strides[d])
    outer = [d for d in rest if strides[d] >= strides[axis]]
    inner = [d for d in rest if strides[d] < strides[axis]]
    size = x.shape[axis]
    a = math.prod(x.shape[d] for d in outer)
    return x.permute(*outer, axis, *inner).reshape(a, size, math.prod(x.shape[d] for d in inner))


def _reduce_columns(x: Tensor, threshold: float, scratch: Scratch) -> Sums:
    """X (rows, columns), a slot for each column."""
    rows, columns = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift = x[::SHIFT_STRIDE].to(dtype).mean(0)
    step = max(1, BLOCK // columns)
    if rows <= step:
        parts = torch.empty((6, columns), dtype=dtype)
        _sums(x.to(dtype), 0, shift, threshold, scratch, parts)
        return Sums(parts, shift, rows)
    blocks = torch.empty((6, -(-rows // step), columns), dtype=dtype)
    for i, block in enumerate(x.split(step)):
        _sums(block.to(dtype), 0, shift, threshold, scratch, blocks[:, i])
    # Blocks add up in float64; extremes are only picked.
    parts = torch.empty((6, columns), dtype=torch.float64)
    torch.sum(blocks[:4], 1, dtype=torch.float64, out=parts[:4])
    parts[4] = blocks[4].amin(0)
    parts[5] = blocks[5].amax(0)
    return Sums(parts, shift, rows)


def _reduce_rows(x: Tensor, threshold: float, scratch: Scratch) -> Sums:
    """X (rows, columns), a slot for each row."""
    rows, columns = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift = torch.empty(rows, dtype=dtype)
    parts = torch.empty((6, rows), dtype=dtype)
    step = max(1, BLOCK // columns)
    for i in range(0, rows, step):
        block = x[i : i + step].to(dtype)
        torch.mean(block, 1, out=shift[i : i + step])
        _sums(block, 1, shift[i : i + step, None], threshold, scratch, parts[:, i : i + step])
    return Sums(parts, shift, columns)


def _sums(
    x: Tensor, dim: int, shift: Tensor, threshold: float, scratch: Scratch, out: Tensor
) -> None:
    """Into `out` (6, slots): sums over `dim` of x - shift, its square, |x| > threshold, x = 0; minimum; maximum."""
    deviation, square, fired, zeros, low, high = out.unbind(0)
    work = scratch.get(x, x.dtype, *x.shape)
    torch.sub(x, shift, out=work)
    torch.sum(work, dim, out=deviation)
    torch.mul(work, work, out=work)
    torch.sum(work, dim, out=square)
    torch.abs(x, out=work).gt_(threshold)
    torch.sum(work, dim, out=fired)
    torch.eq(x, 0, out=work)
    torch.sum(work, dim, out=zeros)
    torch.amin(x, dim, out=low)
    torch.amax(x, dim, out=high)


def masked_in_blocks(x: Tensor, threshold: float) -> Activity:
    """The careful way, for blocks with NaN or infinite values: float64, block by block."""
    step = max(1, 16 * BLOCK // (x.shape[1] * x.shape[2]))
    parts = [masked(block.double(), threshold) for block in x.split(step)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    whole.table[BATCHES].fill_(1)  # blocks of one batch
    return whole


def masked(x: Tensor, threshold: float) -> Activity:
    """X (outer, neurons, inner) → `Activity`, non-finite values left out, without one synchronisation."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = (0, 2)
    finite = x.isfinite()
    n = finite.sum(dims)
    kept = torch.where(finite, x, 0)
    shift = kept.sum(dims) / n.clamp(min=1)
    deviation = torch.where(finite, x - shift[:, None], 0)
    residue = deviation.sum(dims).double() / n.clamp(min=1)
    rows = (
        n,
        (kept.abs() > threshold).sum(dims),
        n - (kept != 0).sum(dims),
        x.shape[0] * x.shape[2] - n,
        torch.ones_like(n),
        shift + residue,
        (deviation.square().sum(dims).double() - residue.square() * n).clamp(min=0),
        torch.where(finite, x, torch.inf).amin(dims),
        torch.where(finite, x, -torch.inf).amax(dims),
    )
    return Activity(torch.stack([row.double() for row in rows]))

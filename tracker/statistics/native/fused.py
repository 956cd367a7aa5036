"""One pass over a layer's output on a GPU: two launches of Triton's code, and nothing that waits for them.

The first reduces tiles of the output, the second merges what they found into the layer's table, both by the formula
of Chan, Golub & LeVeque (1983) in float64. Within a tile, moments are taken in fp32 about the tile's own mean, after a
multiplication by a power of two, which rounds nothing and keeps squares finite. Nothing is added atomically: the same
data give the same numbers.

No GPU was at hand when this was written: it is tested on the CPU by Triton's interpreter, and not measured.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from tracker.statistics.activity import ROWS
from tracker.statistics.native.calls import require

TILE = 4096  # values of a tile
PROGRAMS = 2048  # about as many run at once as a large GPU takes
MERGED = 128  # neurons of one program that merges


@triton.jit
def _chan(count, mean, m2, other_count, other_mean, other_m2):  # type: ignore[no-untyped-def]
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    x, parts, observations, neurons, inner, by_outer, by_neuron, by_inner, length, threshold,
    wide: tl.constexpr, tall: tl.constexpr,
):  # fmt: skip
    """Program (i, j): observations i·length to (i + 1)·length of `wide` neurons, `tall` at a time → parts[i].

    x: (outer, neurons, inner) with these strides. length: a multiple of `tall`. parts: (programs, 8, neurons) float64:
    finite values, fired, zeros, non-finite ones, mean, sum of squared deviations, minimum, maximum.
    """
    neuron = tl.program_id(1) * wide + tl.arange(0, wide)
    real = neuron < neurons
    column = x + neuron.to(tl.int64) * by_neuron
    count = tl.zeros([wide], tl.float64)
    mean = tl.zeros([wide], tl.float64)
    m2 = tl.zeros([wide], tl.float64)
    fired = tl.zeros([wide], tl.float64)
    zeros = tl.zeros([wide], tl.float64)
    seen = tl.zeros([wide], tl.float64)
    low = tl.full([wide], float("inf"), tl.float64)
    high = tl.full([wide], float("-inf"), tl.float64)
    begin = tl.program_id(0).to(tl.int64) * length
    for tile in range(0, length, tall):
        at = begin + tile + tl.arange(0, tall)
        row = at // inner
        place = row * by_outer + (at - row * inner) * by_inner
        inside = (at < observations)[:, None] & real[None, :]
        value = tl.load(column[None, :] + place[:, None], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(value)
        finite = inside & (size < float("inf"))  # false for NaN
        n = tl.sum(finite.to(tl.int32), 0).to(tl.float64)
        zeros += tl.sum((finite & (value == 0)).to(tl.int32), 0).to(tl.float64)
        fired += tl.sum((finite & (size > threshold)).to(tl.int32), 0).to(tl.float64)
        seen += tl.sum(inside.to(tl.int32), 0).to(tl.float64)
        low = tl.minimum(low, tl.min(tl.where(finite, value, float("inf")), 0).to(tl.float64))
        high = tl.maximum(high, tl.max(tl.where(finite, value, float("-inf")), 0).to(tl.float64))
        kept = tl.where(finite, value, 0.0)
        # The power of two at or below the greatest value, from its exponent's bits; and its reciprocal.
        bits = tl.max(tl.where(finite, size, 0.0), 0).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        kept = kept * ((254 << 23) - bits).to(tl.float32, bitcast=True)[None, :]
        unit = bits.to(tl.float32, bitcast=True).to(tl.float64)
        some = tl.maximum(n, 1.0)
        centre = (tl.sum(kept, 0).to(tl.float64) / some).to(tl.float32)
        away = tl.where(finite, kept - centre[None, :], 0.0)
        rest = tl.sum(away, 0).to(tl.float64) / some
        square = tl.sum(away * away, 0).to(tl.float64) - rest * rest * n
        own = (centre.to(tl.float64) + rest) * unit
        square = tl.maximum(square, 0.0) * unit * unit
        count, mean, m2 = _chan(count, mean, m2, n, own, square)
    out = parts + tl.program_id(0).to(tl.int64) * 8 * neurons + neuron
    tl.store(out, count, mask=real)
    tl.store(out + neurons, fired, mask=real)
    tl.store(out + 2 * neurons, zeros, mask=real)
    tl.store(out + 3 * neurons, seen - count, mask=real)
    tl.store(out + 4 * neurons, mean, mask=real)
    tl.store(out + 5 * neurons, m2, mask=real)
    tl.store(out + 6 * neurons, low, mask=real)
    tl.store(out + 7 * neurons, high, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(parts, table, programs, neurons, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merge parts (programs, 8, neurons) into a table (9, neurons), whose rows `Activity` names."""
    neuron = tl.program_id(0) * wide + tl.arange(0, wide)
    real = neuron < neurons
    home = table + neuron
    count = tl.load(home, mask=real, other=0.0)
    fired = tl.load(home + neurons, mask=real, other=0.0)
    zeros = tl.load(home + 2 * neurons, mask=real, other=0.0)
    nonfinite = tl.load(home + 3 * neurons, mask=real, other=0.0)
    batches = tl.load(home + 4 * neurons, mask=real, other=0.0)
    mean = tl.load(home + 5 * neurons, mask=real, other=0.0)
    m2 = tl.load(home + 6 * neurons, mask=real, other=0.0)
    low = tl.load(home + 7 * neurons, mask=real, other=0.0)
    high = tl.load(home + 8 * neurons, mask=real, other=0.0)
    for i in range(programs):
        part = parts + i * 8 * neurons + neuron
        fired += tl.load(part + neurons, mask=real, other=0.0)
        zeros += tl.load(part + 2 * neurons, mask=real, other=0.0)
        nonfinite += tl.load(part + 3 * neurons, mask=real, other=0.0)
        n = tl.load(part, mask=real, other=0.0)
        own = tl.load(part + 4 * neurons, mask=real, other=0.0)
        square = tl.load(part + 5 * neurons, mask=real, other=0.0)
        low = tl.minimum(low, tl.load(part + 6 * neurons, mask=real, other=0.0))
        high = tl.maximum(high, tl.load(part + 7 * neurons, mask=real, other=0.0))
        count, mean, m2 = _chan(count, mean, m2, n, own, square)
    tl.store(home, count, mask=real)
    tl.store(home + neurons, fired, mask=real)
    tl.store(home + 2 * neurons, zeros, mask=real)
    tl.store(home + 3 * neurons, nonfinite, mask=real)
    tl.store(home + 4 * neurons, batches + 1, mask=real)
    tl.store(home + 5 * neurons, mean, mask=real)
    tl.store(home + 6 * neurons, m2, mask=real)
    tl.store(home + 7 * neurons, low, mask=real)
    tl.store(home + 8 * neurons, high, mask=real)


def add(x: Tensor, threshold: float, table: Tensor) -> None:
    """Merge one output into a table in place.

    x: (outer, neurons, inner) of any strides, in fp32, fp16 or bf16, on the table's device. table: (9, neurons)
    float64, contiguous.
    """
    outer, neurons, inner = x.shape
    require(table, torch.float64, (ROWS, neurons), x.device.type)
    observations = outer * inner
    # Tiles lie along what is contiguous: rows of many neurons, or the maps of a few.
    rows = inner == 1 or x.stride(1) <= x.stride(2)
    wide = min(64, triton.next_power_of_2(neurons)) if rows else 1
    tall = TILE // wide
    across = triton.cdiv(neurons, wide)
    tiles = triton.cdiv(observations, tall)
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // across)))
    programs = triton.cdiv(tiles, each)
    parts = table.new_empty((programs, ROWS - 1, neurons))
    here = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with here:
        _reduce[programs, across](
            x, parts, observations, neurons, inner, *(x.stride(d) for d in (0, 1, 2)), each * tall, threshold,
            wide=wide, tall=tall,
        )  # fmt: skip
        _merge[(triton.cdiv(neurons, MERGED),)](parts, table, programs, neurons, wide=MERGED)

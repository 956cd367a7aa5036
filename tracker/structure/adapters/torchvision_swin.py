"""Attention in shifted windows (Liu et al., 2021 and 2022) whose heads are free of the width around them.

Torchvision's takes the width of its inputs for that of all heads together. Imported only for models that have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from tracker.structure.adapters.attention import free_heads
from tracker.structure.adapters.registry import ModuleAdapter, register_adapter


class _Windows(nn.Module):
    """Forward of the twins below. Parameters, their names and the arguments are those of torchvision's modules."""

    scale: float
    head_dim: int
    v_head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Attention within windows; x: (batch, sizes of two or three dimensions, channels)."""
        m: Any = self
        sizes = x.shape[1:-1]
        n = len(sizes)
        windows = list(m.window_size)
        if n == 3:  # of videos they shrink with what they see
            windows = [min(window, size) for window, size in zip(windows, sizes, strict=True)]
        missing = [-size % window for size, window in zip(sizes, windows, strict=True)]
        x = F.pad(x, (0, 0, *(amount for each in reversed(missing) for amount in (0, each))))
        whole = x.shape[1:-1]
        # A window that covers all of a dimension need not be shifted along it.
        shifts = [
            0 if window >= size else shift
            for window, shift, size in zip(windows, m.shift_size, whole, strict=True)
        ]
        dims = tuple(range(1, n + 1))
        x = x.roll([-shift for shift in shifts], dims)
        for dim in reversed(dims):
            x = x.unflatten(dim, (-1, windows[dim - 1]))
        # Batch, windows along each dimension, places in a window along each dimension, channels.
        x = x.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), -1)
        grid = x.shape[: n + 1]
        x = x.flatten(n + 1, 2 * n).flatten(0, n)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (m.num_heads, size)).transpose(1, 2)
            for w, b, size in self.projections()
        )
        if self._cosine:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * m.logit_scale.clamp(max=math.log(100.0)).exp()
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + m.get_relative_position_bias(*([windows] if n == 3 else []))
        if any(shifts):
            apart = _apart(x, whole, windows, shifts)
            scores = scores.unflatten(0, (-1, len(apart))) + apart[:, None]
            scores = scores.flatten(0, 1)
        weights = F.dropout(F.softmax(scores, dim=-1), m.attention_dropout, self.training)
        x = (weights @ v).transpose(1, 2).flatten(2)
        x = F.dropout(F.linear(x, m.proj.weight, m.proj.bias), m.dropout, self.training)
        x = x.unflatten(0, grid).unflatten(n + 1, windows)
        x = x.permute(0, *(d for dim in dims for d in (dim, dim + n)), -1)
        for dim in dims:
            x = x.flatten(dim, dim + 1)
        x = x.roll(shifts, dims)
        for dim, size in zip(dims, sizes, strict=True):
            x = x.narrow(dim, 0, size)
        return x.contiguous()

    @property
    def _cosine(self) -> bool:
        return isinstance(self, ShiftedWindowAttentionV2)

    def projections(self) -> list[tuple[Tensor, Tensor | None, int]]:
        """Weight, bias, and width of a head, of queries, keys and values."""
        m: Any = self
        inner = m.num_heads * self.head_dim
        weight, bias = m.qkv.weight, m.qkv.bias
        parts = []
        for i, size in enumerate((self.head_dim, self.head_dim, self.v_head_dim)):
            at = slice(i * inner, (i + 1) * inner if i < 2 else None)
            own = None if bias is None else bias[at]
            if own is not None and i == 1 and self._cosine:
                own = own * 0  # the second version's keys have none
            parts.append((weight[at], own, size))
        return parts


def _apart(
    x: Tensor, sizes: Sequence[int], windows: Sequence[int], shifts: Sequence[int]
) -> Tensor:
    """-100 between places of a window that the shift brought together: (windows, places, places)."""
    region = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, window, shift in zip(sizes, windows, shifts, strict=True):
        at = torch.arange(size, device=x.device)
        region = 3 * region[..., None] + (at >= size - window) + (at >= size - shift)
    n = len(sizes)
    for dim in reversed(range(n)):
        region = region.unflatten(dim, (-1, windows[dim]))
    region = region.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).flatten(n).flatten(0, n - 1)
    return x.new_zeros(()).masked_fill(region[:, None] != region[:, :, None], -100.0)


class DecoupledShiftedWindowAttention(_Windows, ShiftedWindowAttention):  # type: ignore[misc]
    """`ShiftedWindowAttention` after a removal."""


class DecoupledShiftedWindowAttentionV2(_Windows, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """`ShiftedWindowAttentionV2` after a removal."""


class DecoupledShiftedWindowAttention3d(_Windows, ShiftedWindowAttention3d):  # type: ignore[misc]
    """`ShiftedWindowAttention3d` after a removal."""


def _fits(module: Any) -> bool:
    """Whether torchvision's own forward could run with the weights as they are."""
    made, read = module.qkv.weight.shape
    return bool(made == 3 * read and tuple(module.proj.weight.shape) == (read, read))


def _adapt(module: Any) -> None:
    module.head_dim = module.qkv.in_features // module.num_heads
    free_heads(module, module.head_dim)


register_adapter(
    ModuleAdapter(ShiftedWindowAttention, DecoupledShiftedWindowAttention, _fits, _adapt)
)
register_adapter(
    ModuleAdapter(ShiftedWindowAttentionV2, DecoupledShiftedWindowAttentionV2, _fits, _adapt)
)
register_adapter(
    ModuleAdapter(ShiftedWindowAttention3d, DecoupledShiftedWindowAttention3d, _fits, _adapt)
)

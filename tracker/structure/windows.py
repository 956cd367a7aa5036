"""Attention in shifted windows (Liu et al., 2021 and 2022) whose heads are free of the width around them.

Torchvision's takes the width of its inputs for that of all heads together. Imported only for models that have it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class _Windows(nn.Module):
    """Forward of the twins below. Parameters, their names and the arguments are those of torchvision's modules."""

    scale: float
    head_dim: int
    v_head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Attention within windows; x: (batch, height, width, channels)."""
        m: Any = self
        height, width = x.shape[1:3]
        high, wide = m.window_size
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
        tall, broad = x.shape[1:3]
        # A window that covers all of a dimension need not be shifted along it.
        down, right = (
            0 if w >= n else s
            for w, s, n in zip(m.window_size, m.shift_size, (tall, broad), strict=True)
        )
        x = x.roll((-down, -right), (1, 2))
        x = x.unflatten(2, (broad // wide, wide)).unflatten(1, (tall // high, high))
        x = x.transpose(2, 3)  # batch, rows and columns of windows, places in a window, channels
        grid = x.shape[:3]
        x = x.flatten(3, 4).flatten(0, 2)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (m.num_heads, size)).transpose(1, 2)
            for w, b, size in self._weights()
        )
        if self._cosine:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * m.logit_scale.clamp(max=math.log(100.0)).exp()
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + m.get_relative_position_bias()
        if down or right:
            apart = self._apart(x, tall, broad, down, right)
            scores = scores.unflatten(0, (-1, len(apart))) + apart[:, None]
            scores = scores.flatten(0, 1)
        weights = F.dropout(F.softmax(scores, dim=-1), m.attention_dropout, self.training)
        x = (weights @ v).transpose(1, 2).flatten(2)
        x = F.dropout(F.linear(x, m.proj.weight, m.proj.bias), m.dropout, self.training)
        x = x.unflatten(0, grid).unflatten(3, (high, wide)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        return x.roll((down, right), (1, 2))[:, :height, :width].contiguous()

    @property
    def _cosine(self) -> bool:
        return isinstance(self, ShiftedWindowAttentionV2)

    def _weights(self) -> list[tuple[Tensor, Tensor | None, int]]:
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

    def _apart(self, x: Tensor, tall: int, broad: int, down: int, right: int) -> Tensor:
        """-100 between places of a window that the shift brought together: (windows, places, places)."""
        m: Any = self
        high, wide = m.window_size
        rows, columns = (
            (at >= size - window).long() + (at >= size - shift).long()
            for at, size, window, shift in (
                (torch.arange(tall, device=x.device), tall, high, down),
                (torch.arange(broad, device=x.device), broad, wide, right),
            )
        )
        region = (3 * rows[:, None] + columns).unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        region = region.transpose(1, 2).flatten(2).flatten(0, 1)
        return x.new_zeros(()).masked_fill(region[:, None] != region[:, :, None], -100.0)


class FreeWindows(_Windows, ShiftedWindowAttention):
    """`ShiftedWindowAttention` after a removal."""


class FreeWindowsV2(_Windows, ShiftedWindowAttentionV2):
    """`ShiftedWindowAttentionV2` after a removal."""


TWINS: dict[type, type] = {
    ShiftedWindowAttention: FreeWindows,
    ShiftedWindowAttentionV2: FreeWindowsV2,
}


def fits_torchvision(module: Any) -> bool:
    """Whether torchvision's own forward could run with the weights as they are."""
    made, read = module.qkv.weight.shape
    return bool(made == 3 * read and tuple(module.proj.weight.shape) == (read, read))

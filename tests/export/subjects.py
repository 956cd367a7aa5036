"""Models to export. Nothing here imports the library: files of them are loaded where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """One attention of torch, called in several ways."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Masked(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.attention(x, x, x, key_padding_mask=hidden, attn_mask=later)
        return self.out(y), weights


class Block(nn.Module):
    """A residual block that is called with more than its input, and gives a tuple."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor, scale: float = 1.0, **more: object) -> tuple[Tensor]:
        return (x + scale * self.out(torch.relu(self.into(x))),)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=1.0)[0]
        return self.head(x)


class Numbered(Stack):
    """One that finds its blocks by number."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(4):
            x = self.blocks[i](x, scale=1.0)[0]
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3)
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))

"""One small model for every kind of layer that has neurons, with the axis that its neurons lie on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A layer, an input for it, the number of its neurons, and their axis in its (first) output."""

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    neurons: int
    axis: int
    tokens: int = 0  # inputs are token ids below this number


class Affine(nn.Module):
    """A custom leaf with raw parameters, functional, whose class nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 7))
        self.b = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ij->...j", x, self.w) + self.b


class ChannelScale(nn.Module):
    """A custom leaf whose neurons are channels (axis 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


CASES: dict[str, Case] = {
    "Linear": Case(lambda: nn.Linear(5, 7), (8, 5), 7, -1),
    "Linear on sequences": Case(lambda: nn.Linear(5, 7), (4, 3, 5), 7, -1),
    "Linear unbatched": Case(lambda: nn.Linear(5, 7), (5,), 7, -1),
    "Linear without bias": Case(lambda: nn.Linear(5, 7, bias=False), (8, 5), 7, -1),
    "Conv1d": Case(lambda: nn.Conv1d(3, 6, 3), (4, 3, 9), 6, -2),
    "Conv1d unbatched": Case(lambda: nn.Conv1d(3, 6, 3), (3, 9), 6, -2),
    "Conv2d": Case(lambda: nn.Conv2d(3, 6, 3), (4, 3, 9, 8), 6, -3),
    "Conv2d grouped": Case(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 9, 8), 6, -3),
    "Conv3d": Case(lambda: nn.Conv3d(3, 6, 2), (2, 3, 4, 5, 4), 6, -4),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(3, 6, 3), (4, 3, 9), 6, -2),
    "ConvTranspose2d": Case(lambda: nn.ConvTranspose2d(3, 6, 3), (4, 3, 5, 5), 6, -3),
    "ConvTranspose3d": Case(lambda: nn.ConvTranspose3d(3, 6, 2), (2, 3, 3, 3, 3), 6, -4),
    "BatchNorm1d": Case(lambda: nn.BatchNorm1d(5), (8, 5), 5, 1),
    "BatchNorm1d on maps": Case(lambda: nn.BatchNorm1d(5), (8, 5, 4), 5, 1),
    "BatchNorm2d": Case(lambda: nn.BatchNorm2d(5), (4, 5, 6, 6), 5, 1),
    "BatchNorm3d": Case(lambda: nn.BatchNorm3d(5), (2, 5, 3, 3, 3), 5, 1),
    "InstanceNorm2d": Case(lambda: nn.InstanceNorm2d(5), (4, 5, 6, 6), 5, -3),
    "GroupNorm": Case(lambda: nn.GroupNorm(2, 6), (4, 6, 5), 6, 1),
    "LayerNorm": Case(lambda: nn.LayerNorm(7), (4, 3, 7), 7, -1),
    "RMSNorm": Case(lambda: nn.RMSNorm(7), (4, 3, 7), 7, -1),
    "Embedding": Case(lambda: nn.Embedding(11, 6), (4, 3), 6, -1, tokens=11),
    "EmbeddingBag": Case(lambda: nn.EmbeddingBag(11, 6), (4, 3), 6, -1, tokens=11),
    "LSTM": Case(lambda: nn.LSTM(5, 6), (7, 4, 5), 6, -1),
    "LSTM batch first": Case(lambda: nn.LSTM(5, 6, batch_first=True), (4, 7, 5), 6, -1),
    "LSTM bidirectional": Case(
        lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True), (7, 4, 5), 12, -1
    ),
    "LSTM projected": Case(lambda: nn.LSTM(5, 6, proj_size=3), (7, 4, 5), 3, -1),
    "GRU": Case(lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True), (4, 7, 5), 12, -1),
    "RNN": Case(lambda: nn.RNN(5, 6), (7, 4, 5), 6, -1),
    "LSTMCell": Case(lambda: nn.LSTMCell(5, 6), (4, 5), 6, -1),
    "Custom, last axis": Case(Affine, (4, 3, 5), 7, -1),
    "Custom, channels": Case(ChannelScale, (4, 6, 5, 5), 6, 1),
}


def example(case: Case, seed: int = 0) -> Tensor:
    """An input for the layer."""
    g = torch.Generator().manual_seed(seed)
    if case.tokens:
        return torch.randint(case.tokens, case.inputs, generator=g)
    return torch.randn(case.inputs, generator=g)


class Attention(nn.Module):
    """nn.MultiheadAttention over one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])

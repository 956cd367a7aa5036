"""Layers whose weight is computed before it is used."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def plain_weight_norm(layer: nn.Module) -> nn.Module:
    """torch's first weight norm, a hook that sets the weight before each pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Squashed(nn.Module):
    """Number by number."""

    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w)


class UnitRows(nn.Module):
    """Each row of length one."""

    def forward(self, w: Tensor) -> Tensor:
        return w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1))


def computed(layer: nn.Module, how: nn.Module) -> nn.Module:
    """The layer, its weight computed by a parametrization."""
    parametrize.register_parametrization(layer, "weight", how)
    return layer

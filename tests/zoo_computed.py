"""Layers whose weight is computed before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


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


class Scaled(nn.Module):
    """Equalised learning rate: by a constant that was made of the layer's first width."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, w: Tensor) -> Tensor:
        return w * self.scale


def thinned(layer: nn.Module) -> nn.Module:
    """A third of its weights are masked."""
    return prune.random_unstructured(layer, "weight", 0.3)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": weight_norm,
    "first weight norm": plain_weight_norm,
    "spectral norm": spectral_norm,
    "first spectral norm": nn.utils.spectral_norm,
    "squashed": lambda layer: computed(layer, Squashed()),
    "unit rows": lambda layer: computed(layer, UnitRows()),
    "pruning mask": thinned,
    "equalised": lambda layer: computed(layer, Scaled((2 / layer.weight[0].numel()) ** 0.5)),
}

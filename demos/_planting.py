"""Known facts, planted into a network: a tool that finds them can be believed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def plant_dead(layer: nn.Linear, slots: Sequence[int]) -> None:
    """Let neurons of `layer` put out zero whatever comes in.

    Behind a ReLU they also stay dead in training: its gradient at zero is zero.
    """
    layer.weight[slots] = 0.0
    layer.bias[slots] = 0.0


@torch.no_grad()
def plant_twin(
    layer: nn.Linear, original: int, twin: int, scale: float = 1.0, lift: float = 0.0
) -> None:
    """Make neuron `twin` of `layer` put out `scale` times what `original` does.

    The original is lifted first, if asked: behind a ReLU, what never fires has no twin.
    """
    layer.bias[original] += lift
    layer.weight[twin] = scale * layer.weight[original]
    layer.bias[twin] = scale * layer.bias[original]


@torch.no_grad()
def plant_busy(model: nn.Module, layer: nn.Linear, images: Tensor) -> None:
    """Make all neurons of `layer` fire on all `images`, each with a message of its own.

    Their weights are the main axes of what the layer reads, so no two are correlated; the bias
    lifts each one above zero. A layer like that has no neuron to spare.
    """
    read: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(images)
    handle.remove()
    strength, axes = torch.linalg.eigh(torch.cov(read[0].T.double()))
    main = slice(-layer.out_features, None)  # eigh sorts upwards
    weight = (axes[:, main] / strength[main].sqrt()).T.float()
    layer.weight.copy_(weight)
    layer.bias.copy_(1.0 - (read[0] @ weight.T).amin(0))

"""Where new units should look: the directions by which the loss falls fastest, from gradients of ordinary training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracker.modules.kinds import is_linear, made_along, weight_of
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.utils.nested import tensors_in


def directions_of(product: Tensor) -> Tensor | None:
    """Right singular vectors of Σ δᵀx that tell something, best first: (rank, features). None where nothing does.

    product: (outputs of all consumers, features): δ the gradient at the consumers' outputs, x the inputs of the layer
    that grows. GradMax (Evci et al., 2022, section 3) with the roles of incoming and outgoing weights exchanged,
    since incoming weights of zero never learn behind a ReLU.
    """
    if not bool(product.isfinite().all()) or not bool(product.any()):
        return None
    _, strength, directions = torch.linalg.svd(product.double(), full_matrices=False)
    return directions[strength > 1e-9 * strength[0]]


class GradientWatcher:
    """Sums δᵀx of training passes into `products`, by layer: (outputs of its readers, features) float64 on the CPU.

    readers: Layer that may grow → modules that read its units. Layers and readers that are not linear are left out,
    and so is what runs inside compiled graphs.
    """

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Sequence[str]], products: dict[str, Tensor]
    ) -> None:
        self.handles: list[Any] = []
        for layer, names in readers.items():
            makes: Any = model.get_submodule(layer)
            reads: list[Any] = [model.get_submodule(name) for name in names]
            if not reads or not all(is_linear(m) for m in (makes, *reads)):
                continue
            into, start = _IntoHook(), 0
            widths = [weight_of(m).shape[made_along(m)] for m in reads]
            features = weight_of(makes).shape[1 - made_along(makes)]
            products[layer] = torch.zeros(sum(widths), features, dtype=torch.float64)
            self.handles.append(makes.register_forward_pre_hook(into, with_kwargs=True))
            for module, width in zip(reads, widths, strict=True):
                part = products[layer][start : start + width]
                start += width
                self.handles.append(module.register_forward_hook(_OutOfHook(into, part)))


class _IntoHook(GraphHook):
    """Keeps what the layer that may grow took last."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Forward pre-hook."""
        if not torch.compiler.is_compiling() and is_new_data():
            self.last = tensors_in((args, kwargs))[0].detach()


class _OutOfHook(GraphHook):
    """Adds the gradient at a reader's output, times what the layer took in the same pass."""

    def __init__(self, into: _IntoHook, part: Tensor) -> None:
        super().__init__()
        self._into, self._part = into, part

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        """Forward hook."""
        if torch.compiler.is_compiling() or not output.requires_grad or not is_new_data():
            return
        x = self._into.last
        if x is None or x.shape[:-1] != output.shape[:-1]:
            return
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]

        def arrived(delta: Tensor) -> None:
            with torch.no_grad():
                flat = delta.reshape(-1, delta.shape[-1])
                self._part.add_((flat.float().T @ rows.float()).double().cpu())

        output.register_hook(arrived)

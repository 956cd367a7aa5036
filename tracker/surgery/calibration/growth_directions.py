"""Where new units should look: the directions by which the loss falls fastest, from gradients of ordinary training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracker.modules.kinds import is_linear, made_along, weight_of
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.utils.nested import tensors_in

LEADING = 8  # directions whose gain is told
KEPT, EACH = 64, 4  # rows of what a layer took that are kept, and of each pass


def directions_of(product: Tensor) -> Tensor | None:
    """Right singular vectors of Σ δᵀx that tell something, best first: (rank, features). None where nothing does.

    product: (outputs of all consumers, features): δ the gradient at the consumers' outputs, x the inputs of the layer
    that grows. GradMax (Evci et al., 2022, section 3) with the roles of incoming and outgoing weights exchanged,
    since incoming weights of zero never learn behind a ReLU.
    """
    if not bool(product.isfinite().all()) or not bool(product.any()):
        return None
    _, strength, directions = torch.linalg.svd(product.double().cpu(), full_matrices=False)
    result: Tensor = directions[strength > 1e-9 * strength[0]]
    return result


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first LEADING singular triples, by subspace iteration (Halko et al., 2011): a whole SVD takes too long."""
    start = torch.Generator().manual_seed(0)
    ahead = torch.randn(matrix.shape[1], LEADING, generator=start, dtype=torch.float64)
    for _ in range(4):
        basis, _ = torch.linalg.qr(matrix @ ahead)
        ahead = matrix.T @ basis
    inner, strength, right = torch.linalg.svd(ahead.T, full_matrices=False)
    live = strength > 1e-9 * strength[0]
    return (basis @ inner)[:, live], strength[live], right[live]


def strengths_of(product: Tensor, rows: Tensor, curvatures: Sequence[Tensor | None]) -> Tensor:
    """What the loss falls by with a unit along each direction of `directions_of`: (at most LEADING,).

    product: A mean over passes. rows: Of what the layer takes, (observations, features).
    curvatures: Of the loss at each reader, (outputs, outputs) or (outputs,), in the order of the product's rows.
    """
    none = torch.zeros(0, dtype=torch.float64)
    if (
        any(c is None for c in curvatures)
        or not bool(product.isfinite().all())
        or not product.any()
    ):
        return none
    left, strength, right = _leading(product.double().cpu())
    bends, start = torch.zeros_like(strength), 0
    for c in curvatures:
        assert c is not None
        v = left[start : start + len(c)]
        bends += (v * ((c @ v) if c.ndim == 2 else c[:, None] * v)).sum(0)
        start += len(c)
    if start != len(left):
        return none
    power = (rows.double() @ right.T).square().mean(0)
    gains = 0.5 * strength.square() / (bends * power)
    return torch.where(gains.isfinite(), gains, 0.0)


class GradientWatcher:
    """Sums δᵀx of training passes into `products`, by layer: (outputs of its readers, features), on its device.

    readers: Layer that may grow → modules that read its units. Layers and readers that are not linear are left out,
    and so is what runs inside compiled graphs. `into` gets, by layer, some rows of what it took: (KEPT, features).
    """

    def __init__(
        self,
        model: nn.Module,
        readers: Mapping[str, Sequence[str]],
        products: dict[str, Tensor],
        into: dict[str, Tensor],
    ) -> None:
        self.handles: list[Any] = []
        for layer, names in readers.items():
            makes: Any = model.get_submodule(layer)
            reads: list[Any] = [model.get_submodule(name) for name in names]
            if not reads or not all(is_linear(m) for m in (makes, *reads)):
                continue
            widths = [weight_of(m).shape[made_along(m)] for m in reads]
            weight = weight_of(makes)
            features = weight.shape[1 - made_along(makes)]
            kept = into[layer] = torch.zeros(KEPT, features)
            hook, start = _IntoHook(kept), 0
            products[layer] = torch.zeros(sum(widths), features, device=weight.device)
            self.handles.append(makes.register_forward_pre_hook(hook, with_kwargs=True))
            for module, width in zip(reads, widths, strict=True):
                part = products[layer][start : start + width]
                start += width
                self.handles.append(
                    module.register_forward_hook(_OutOfHook(hook, part), prepend=True)
                )


class _IntoHook(GraphHook):
    """Keeps what the layer that may grow took last."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self._kept = kept

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Forward pre-hook."""
        if not torch.compiler.is_compiling() and is_new_data():
            self.last = tensors_in((args, kwargs))[0].detach()
            rows = self.last.reshape(-1, self.last.shape[-1])[:EACH].float().cpu()
            self._kept.copy_(torch.cat((rows, self._kept))[: len(self._kept)])  # the latest


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
                self._part.addmm_(flat.float().T, rows.float())

        output.register_hook(arrived)

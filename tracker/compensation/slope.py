"""The first-order part of what a removal costs: where the loss falls or rises along the change itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tracker.compensation.linear import cholesky, ridge_of
from tracker.compensation.select import columns_of


def slope_along(
    covariance: Tensor,
    cross: Tensor,
    units: Sequence[Sequence[int]],
    order: Sequence[int],
    *,
    ridge: float = 1e-4,
) -> Tensor:
    """⟨∇W, ΔW⟩ once the first 1, 2, … units of `order` are gone and the others have taken over: (len(order),) float64.

    covariance: (n, n); cross: ∇Wᵀ W, (n, n), W the consumers' weight and ∇W the gradient of the loss by it.

    With K first, C = L Lᵀ, ΔW_K = W_R L_RK L_KK⁻¹ and ΔW_R = −W_R, so that with Q = L⁻¹ ∇Wᵀ W it is the negative sum of
    L ∘ Qᵀ over the last rows and columns.
    """
    gone = set(order)
    columns = columns_of(
        units, [u for u in range(len(units)) if u not in gone] + list(reversed(order))
    )
    c = covariance.double()
    part = c[columns[:, None], columns]
    part.diagonal().add_(ridge_of(c, ridge)[columns])
    factor = cholesky(part)
    q = torch.linalg.solve_triangular(factor, cross[columns[:, None], columns], upper=False)
    each = (factor * q.T).tril()
    tails = (
        each.sum(0).flip(0).cumsum(0)
    )  # what stands below the diagonal of the last columns is in the last rows
    widths = torch.tensor([len(units[u]) for u in order], dtype=torch.int64)
    result: Tensor = -tails[widths.cumsum(0) - 1]
    return result

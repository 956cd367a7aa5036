"""What the kept columns take over from the removed ones: centred least squares, folded into weights and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.compensation.linear import (
    EXACT,
    SPARE,
    TINY,
    basis,
    cholesky,
    coefficients,
    default_ridge,
    ridge_of,
    second_moment,
)


@dataclass(frozen=True, slots=True)
class Solution:
    """Consumers of k kept columns of n that compute, as nearly as possible, what they computed from all.

    weight:    (m, k) float64
    bias:      (m,) float64, None for consumers without
    mixing:    (r, k): removed ≈ mixing · kept + shift
    shift:     (r,)
    explained: (r,): R² of each removed column
    error:     expected squared error of the consumers' outputs, summed over them
    exact:     every removed column is explained up to rounding, by enough observations to tell
    """

    weight: Tensor
    bias: Tensor | None
    mixing: Tensor
    shift: Tensor
    explained: Tensor
    error: float
    exact: bool


def compensate(
    covariance: Tensor,
    mean: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Sequence[int],
    *,
    count: int | None,
    ridge: float | None = None,
    tolerance: float = EXACT,
) -> Solution:
    """Least squares of the removed columns on the kept ones (with an intercept if there is a bias to hold it).

    covariance: (n, n); mean: (n,); weight: (m, n); bias: (m,). A convolution's weight (O, n, kh, kw) is handed in as
    (O·kh·kw, n), its bias shift summed over the kernel positions by the caller.
    Columns that the kept ones explain exactly get exact coefficients; a ridge would bias them.
    """
    mean = mean.double()
    c = covariance.double() if bias is not None else second_moment(covariance.double(), mean)
    w = weight.double()
    keep = torch.tensor(list(kept), dtype=torch.int64)
    removed = torch.ones(c.shape[0], dtype=torch.bool)
    removed[keep] = False
    gone = removed.nonzero().flatten()
    ridge = default_ridge(count, c.shape[0]) if ridge is None else ridge
    mixing = _ridged(c, keep, gone, ridge)
    support, _ = basis(
        c, keep, count=count, mean=mean if bias is not None else None, tolerance=tolerance
    )
    sharp = coefficients(c, support, gone)
    scatter = torch.zeros_like(mixing)
    place = torch.full((c.shape[0],), -1)
    place[keep] = torch.arange(keep.numel())
    scatter[:, place[support]] = sharp
    variance = c.diagonal()[gone]
    left = _unexplained(c, keep, gone, scatter)
    noise = (torch.finfo(torch.float32).eps * mean[gone]).square() if bias is not None else 0.0
    dead = (variance <= noise) | (variance <= 1e-28 * c.diagonal().max())
    dependent = left <= tolerance * variance
    mixing = torch.where(dependent[:, None], scatter, mixing)
    mixing[dead] = 0.0
    left = _unexplained(c, keep, gone, mixing)
    explained = torch.where(dead, 1.0, 1 - left / variance.clamp(min=1e-300))
    new = w[:, keep] + w[:, gone] @ mixing
    if bias is None:
        shift = torch.zeros_like(variance)
        moved = None
    else:
        shift = mean[gone] - mixing @ mean[keep]
        moved = bias.double() + w[:, gone] @ shift
    change = torch.zeros_like(w)
    change[:, keep], change[:, gone] = w[:, gone] @ mixing, -w[:, gone]
    error = max(float(((change @ c) * change).sum()), 0.0)
    exact = bool((dependent | dead).all()) and (count is None or count >= SPARE)
    return Solution(new, moved, mixing, shift, explained, error, exact)


def residual(covariance: Tensor, weight: Tensor, kept: Sequence[int], ridge: float = 0.0) -> float:
    """Predicted error of keeping only the columns `kept`, as `Selection.errors` has it."""
    c, w = covariance.double(), weight.double()
    keep = torch.tensor(list(kept), dtype=torch.int64)
    removed = torch.ones(c.shape[0], dtype=torch.bool)
    removed[keep] = False
    gone = removed.nonzero().flatten()
    schur = c[gone[:, None], gone] - _ridged(c, keep, gone, ridge) @ c[keep[:, None], gone]
    return max(float(((w[:, gone] @ schur) * w[:, gone]).sum()), 0.0)


def explained_share(covariance: Tensor, mean: Tensor | None = None) -> Tensor:
    """R² of each column by all others: (n,) in [0, 1]; 1 for dependent ones, NaN for constant ones."""
    from_all = covariance.double()
    c = from_all.clone()
    variance = c.diagonal().clone()
    noise = 0.0 if mean is None else (torch.finfo(torch.float32).eps * mean.double()).square()
    alive = ((variance > noise) & (variance > 1e-28 * variance.max())).nonzero().flatten()
    share = torch.full_like(variance, torch.nan)
    scale = variance[alive].rsqrt()
    part = c[alive[:, None], alive] * scale * scale[:, None]
    part.diagonal().add_(TINY)
    left = torch.cholesky_inverse(cholesky(part)).diagonal().reciprocal()
    share[alive] = torch.where(left <= EXACT, 1.0, 1 - left).clamp(0, 1)
    return share


def column_growth(before: Tensor, after: Tensor) -> Tensor:
    """Growth of each kept column of the consumers' weights, ‖after_j‖/‖before_j‖: (k,); 1 where one is zero.

    Gradients of the producers grow by it: first moments are to be scaled by it, second ones by its square.
    """
    old, new = before.double().norm(dim=0), after.double().norm(dim=0)
    ratio = new / old
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def _ridged(c: Tensor, keep: Tensor, gone: Tensor, ridge: float) -> Tensor:
    inner = c[keep[:, None], keep]
    inner.diagonal().add_(ridge_of(c, ridge)[keep])
    return torch.cholesky_solve(c[keep[:, None], gone], cholesky(inner)).T


def _unexplained(c: Tensor, keep: Tensor, gone: Tensor, mixing: Tensor) -> Tensor:
    """Variance of removed - mixing · kept: (r,)."""
    inner = mixing @ c[keep[:, None], keep]
    cross = c[gone[:, None], keep]
    return (c.diagonal()[gone] - (mixing * (2 * cross - inner)).sum(1)).clamp(min=0)

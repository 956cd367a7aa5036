"""Linear algebra of covariances that may be singular: ridges, and which columns the others explain exactly."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-10  # share of a column's variance that may stay unexplained when it is called dependent
SPARE = 8  # observations beyond the rank without which a perfect fit proves nothing
TINY = 1e-13


def default_ridge(count: int | None, columns: int) -> float:
    """Ridge, as a share of the mean variance: few observations need more."""
    return 1e-4 if count is None or count >= 4 * columns else 1e-2


def ridge_of(covariance: Tensor, ridge: float) -> Tensor:
    """What is added to the diagonal: (n,). Never quite 0, so that a Cholesky factor exists."""
    variance = covariance.diagonal()
    return ridge * variance.mean() + TINY * variance.clamp(min=torch.finfo(torch.float64).tiny)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of `matrix` (n, n), or of `matrix` with the least jitter that lets it have one."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        return factor
    jitter, diagonal = TINY, matrix.diagonal().clone()
    shifted = matrix.clone()
    while info:
        shifted.diagonal().copy_(diagonal + jitter * diagonal.abs().max())
        factor, info = torch.linalg.cholesky_ex(shifted)
        jitter *= 10
    return factor


def second_moment(covariance: Tensor, mean: Tensor) -> Tensor:
    """E[x xᵀ] (n, n): what takes the covariance's place for consumers without a bias."""
    return torch.addr(covariance, mean, mean)


def constant(covariance: Tensor, mean: Tensor | None = None) -> Tensor:
    """Columns without variance beyond the rounding of fp32 activations: (n,) bool."""
    variance = covariance.diagonal()
    noise = 0.0 if mean is None else (torch.finfo(torch.float32).eps * mean).square()
    return (variance <= noise) | (variance <= 1e-28 * variance.max())


def basis(
    covariance: Tensor,
    order: Tensor,
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    tolerance: float = EXACT,
) -> tuple[Tensor, Tensor]:
    """Independent columns (k,), and columns that they explain (d,), both of `order`.

    A column joins the basis if what precedes it in `order` leaves more than `tolerance` of its variance unexplained.
    With `count` observations the basis has at most count - SPARE columns: more would fit anything. So the two need
    not be all columns.
    """
    order = order[~constant(covariance, mean)[order]]
    dead = constant(covariance, mean).nonzero().flatten()
    if not order.numel():
        return order, dead
    correlation = covariance[order[:, None], order]
    scale = correlation.diagonal().rsqrt()
    correlation.mul_(scale).mul_(scale[:, None])
    correlation.diagonal().add_(TINY)
    pivots = cholesky(correlation).diagonal().square()
    suspect = pivots <= 1e2 * tolerance
    place = (~suspect).nonzero().flatten()
    if count is not None:
        place = place[: max(count - SPARE, 0)]
    rest = suspect.nonzero().flatten()
    if not rest.numel():
        return order[place], dead
    correlation.diagonal().fill_(1.0)
    cross = correlation[place[:, None], rest]
    half = torch.linalg.solve_triangular(
        cholesky(correlation[place[:, None], place]), cross, upper=False
    )
    left = correlation[rest[:, None], rest].addmm_(half.T, half, alpha=-1)
    # What the tiny ridge let pass as dependent joins the basis after all, largest first.
    added: list[int] = []
    room = len(order) if count is None else max(count - SPARE, 0) - len(place)
    while len(added) < room:
        value, j = left.diagonal().max(0)
        if value <= tolerance:
            break
        added.append(int(rest[j]))
        left.addr_(left[:, j].clone(), left[j].clone(), alpha=-1.0 / float(value))
        left[j], left[:, j] = 0.0, 0.0
    explained = left.diagonal() <= tolerance
    explained &= ~torch.isin(rest, torch.tensor(added, dtype=rest.dtype))
    place = torch.cat((place, torch.tensor(added, dtype=place.dtype)))
    return order[place], torch.cat((dead, order[rest[explained]]))


def coefficients(covariance: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    """Least squares of `targets` on independent `columns`: (targets, columns)."""
    scale = covariance.diagonal()[columns].rsqrt()
    inner = covariance[columns[:, None], columns] * scale * scale[:, None]
    cross = covariance[columns[:, None], targets] * scale[:, None]
    factor = cholesky(inner)
    found = torch.cholesky_solve(cross, factor)
    found += torch.cholesky_solve(cross - inner @ found, factor)  # one step of refinement
    return (found * scale[:, None]).T

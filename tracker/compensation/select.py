"""Which units go, chosen by what the consumers lose once the kept units make up for them.

Error of removing the columns R while K stay: tr(W_R (C_RR - C_RK (C_KK + λ)⁻¹ C_KR) W_Rᵀ), the least-squares error of
the consumers' pre-activations, plus the ridge's own penalty.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.compensation.elimination import BLOCK, Elimination
from tracker.compensation.linear import (
    EXACT,
    basis,
    cholesky,
    coefficients,
    default_ridge,
    ridge_of,
)
from tracker.errors import SurgeryError

FEW = 0.15  # share kept up to which forward selection is tried as well


@dataclass(frozen=True, slots=True)
class Selection:
    """Units in the order in which they go.

    order:  units
    errors: (len(order),) float64: predicted error once the first t + 1 of them are gone
    total:  tr(W C Wᵀ): the variance of what the consumers compute; errors / total is relative
    exact:  how many, from the first, are explained exactly by the kept ones
    """

    order: tuple[int, ...]
    errors: Tensor
    total: float
    exact: int = 0


def columns_of(units: Sequence[Sequence[int]], chosen: Collection[int]) -> Tensor:
    """Columns of the `chosen` units, unit by unit."""
    return torch.tensor([j for u in chosen for j in units[u]], dtype=torch.int64)


def backward(
    covariance: Tensor,
    weight: Tensor,
    units: Sequence[Sequence[int]],
    protected: Collection[int] = (),
    remove: int | None = None,
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    ridge: float | None = None,
    tolerance: float = EXACT,
    block: int = BLOCK,
    limit: float = float("inf"),
) -> Selection:
    """Greedy backward elimination (OBS): again and again the unit whose loss costs least, the rest compensating.

    covariance: (n, n); of consumers without bias, the second moment
    weight:     (m, n): all consumers of these columns, stacked
    units:      columns of each unit; protected: units that stay; remove: how many go (None: all that may)
    mean:       (n,): lets columns that vary only by fp32 rounding count as constant
    limit:      the error behind which nothing more is looked for: the last of `errors` may lie above it

    Units that the others explain exactly (dead, constant, duplicate, linearly dependent) go first. Ties go to the
    lowest index. Source: Hassibi & Stork (1993).
    """
    c, w = covariance.double(), weight.double()
    free = [u for u in range(len(units)) if u not in set(protected)]
    remove = _checked(remove, free, units)
    ridge = default_ridge(count, c.shape[0]) if ridge is None else ridge
    total = _total(c, w)
    exact, leftover, w = _dependent(c, w, units, free, remove, count, mean, tolerance)
    errors = leftover
    kept = [u for u in range(len(units)) if u not in set(exact)]
    order = list(exact)
    if len(order) < remove:
        columns, slots = _pack(units, kept)
        damping = ridge_of(c, ridge)[columns]
        part = c[columns[:, None], columns]
        part.diagonal().add_(damping)
        h = torch.cholesky_inverse(cholesky(part))
        del part
        w = w[:, columns]
        penalty = _per_unit(damping * w.square().sum(0), slots)
        state = Elimination(h, w.T @ w, slots, block)
        del h
        stays = torch.tensor([u not in set(free) for u in kept])
        base = float(errors[-1]) if len(errors) else 0.0
        found, prices = _greedy(
            state, penalty, stays, remove - len(order), sign=1, limit=limit - base
        )
        order += [kept[u] for u in found]
        errors = torch.cat((errors, base + prices.cumsum(0).clamp(min=0)))
    return Selection(tuple(order), errors, total, len(exact))


def explained_units(
    covariance: Tensor,
    weight: Tensor,
    units: Sequence[Sequence[int]],
    protected: Collection[int] = (),
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    tolerance: float = EXACT,
) -> tuple[int, ...]:
    """Units that the others explain exactly, so that all of them can go at once: those that `backward` takes first."""
    c, w = covariance.double(), weight.double()
    free = [u for u in range(len(units)) if u not in set(protected)]
    found, _, _ = _dependent(c, w, units, free, len(free), count, mean, tolerance)
    return tuple(found)


def forward(
    covariance: Tensor,
    weight: Tensor,
    units: Sequence[Sequence[int]],
    keep: int,
    protected: Collection[int] = (),
    *,
    count: int | None = None,
    ridge: float | None = None,
    block: int = BLOCK,
) -> Selection:
    """Greedy forward selection (orthogonal matching pursuit): again and again the unit that explains most.

    Better than `backward` when few units are kept. Arguments as there; `protected` units are among the `keep`.
    The rest goes in the order of what it would still explain, least first.
    """
    c, w = covariance.double(), weight.double()
    if not max(1, len(set(protected))) <= keep <= len(units):
        raise SurgeryError(
            f"Cannot keep {keep} of {len(units)} units, of which {len(set(protected))} are protected."
        )
    ridge = default_ridge(count, c.shape[0]) if ridge is None else ridge
    columns, slots = _pack(units, range(len(units)))
    damping = ridge_of(c, ridge)
    h = c[columns[:, None], columns]
    h.diagonal().add_(damping[columns])
    w = w[:, columns]
    penalty = _per_unit(damping[columns] * w.square().sum(0), slots)
    f = w @ h
    state = Elimination(h, f.T @ f, slots, block)
    first = sorted(set(protected))
    for u in first:
        state.eliminate(u)
    alive = torch.ones(len(units), dtype=torch.bool)
    alive[first] = False
    chosen, _ = _greedy(state, penalty, ~alive, keep - len(first), sign=-1)
    gone = sorted(set(range(len(units))) - set(chosen) - set(first))
    last = dict(zip(state.units.tolist(), state.scores().tolist(), strict=True))
    order = sorted(gone, key=lambda u: (last.get(u, 0.0), u))
    return path(covariance, weight, units, order, ridge=ridge)


def path(
    covariance: Tensor,
    weight: Tensor,
    units: Sequence[Sequence[int]],
    order: Sequence[int],
    *,
    ridge: float = 1e-4,
) -> Selection:
    """The errors along any `order` of removal, from one Cholesky factor: for orders that other criteria found."""
    c, w = covariance.double(), weight.double()
    gone = set(order)
    columns = columns_of(
        units, [u for u in range(len(units)) if u not in gone] + list(reversed(order))
    )
    damping = ridge_of(c, ridge)[columns]
    part = c[columns[:, None], columns]
    part.diagonal().add_(damping)
    w = w[:, columns]
    # With K first, the Schur complement of R is L_RR L_RRᵀ: each column of W L is one step's price.
    price = (w @ cholesky(part)).square().sum(0) - damping * w.square().sum(0)
    widths = torch.tensor([len(units[u]) for u in order], dtype=torch.int64)
    errors = price.flip(0).cumsum(0)[widths.cumsum(0) - 1].clamp(min=0)
    return Selection(tuple(order), errors, _total(c, weight.double()))


def select(
    covariance: Tensor,
    weight: Tensor,
    units: Sequence[Sequence[int]],
    remove: int,
    protected: Collection[int] = (),
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    ridge: float | None = None,
) -> Selection:
    """`backward`; when few units are kept `forward` too, and the one that predicts the smaller error."""
    back = backward(
        covariance, weight, units, protected, remove, count=count, mean=mean, ridge=ridge
    )
    keep = len(units) - remove
    if keep > FEW * len(units) or not remove:
        return back
    ahead = forward(covariance, weight, units, keep, protected, count=count, ridge=ridge)
    return ahead if ahead.errors[-1] < back.errors[-1] else back


def _greedy(
    state: Elimination,
    penalty: Tensor,
    taken: Tensor,
    steps: int,
    sign: int,
    limit: float = float("inf"),
) -> tuple[list[int], Tensor]:
    """`steps` units, each the least (sign 1) or greatest (-1) score less penalty; and those differences.

    limit: Of their sum, behind which no more are taken.
    """
    alive, found, prices, total = ~taken, list[int](), list[float](), 0.0
    start = state.hb.diagonal(dim1=1, dim2=2).amin(1)
    for _ in range(steps):
        alive = state.flush_block(alive)
        price = sign * (state.scores() - penalty[state.units])
        if sign < 0:  # nothing left of it: its score is noise over noise
            spent = state.hb.diagonal(dim1=1, dim2=2).amin(1) <= 1e-10 * start[state.units]
            price = price.masked_fill(spent, 0.0)
        price = price.masked_fill(~alive, torch.inf)
        at = int(price.argmin())
        found.append(int(state.units[at]))
        prices.append(float(price[at]))
        total += prices[-1]
        if total > limit:
            break
        state.eliminate(at)
        alive[at] = False
    return found, torch.tensor(prices, dtype=torch.float64)


def _dependent(
    c: Tensor,
    w: Tensor,
    units: Sequence[Sequence[int]],
    free: Sequence[int],
    remove: int,
    count: int | None,
    mean: Tensor | None,
    tolerance: float,
) -> tuple[list[int], Tensor, Tensor]:
    """Units that the others explain exactly, the errors left, and W with their part folded into the others."""
    stay = [u for u in range(len(units)) if u not in set(free)]
    support, explained = basis(
        c, columns_of(units, [*stay, *free]), count=count, mean=mean, tolerance=tolerance
    )
    spare = set(explained.tolist())
    found = [u for u in free if spare.issuperset(units[u])][:remove]
    columns = columns_of(units, found)
    if not found:
        return [], torch.zeros(0, dtype=torch.float64), w
    mixing = coefficients(c, support, columns)
    mixing[c.diagonal()[columns] == 0] = 0.0
    w = w.clone()
    lost = w[:, columns]
    w[:, support] += lost @ mixing
    w[:, columns] = 0.0
    left = (c.diagonal()[columns] - (mixing * c[columns[:, None], support]).sum(1)).clamp_(min=0)
    sizes = torch.tensor([len(units[u]) for u in found])
    return found, (lost.square().sum(0) * left).cumsum(0)[sizes.cumsum(0) - 1], w


def _checked(remove: int | None, free: Sequence[int], units: Sequence[Sequence[int]]) -> int:
    most = min(len(free), len(units) - 1)
    if remove is None:
        return most
    if not 0 <= remove <= most:
        raise SurgeryError(
            f"Cannot remove {remove} of {len(units)} units: {len(units) - len(free)} are protected and at least "
            f"1 must remain, so at most {most} can go."
        )
    return remove


def _pack(units: Sequence[Sequence[int]], chosen: Collection[int]) -> tuple[Tensor, Tensor]:
    """Columns of the chosen units in a row (n,), and where each unit's are, padded with n: (units, widest)."""
    columns = columns_of(units, chosen)
    wide = max(len(units[u]) for u in chosen)
    slots = torch.full((len(chosen), wide), columns.numel())
    start = 0
    for i, u in enumerate(chosen):
        slots[i, : len(units[u])] = torch.arange(start, start + len(units[u]))
        start += len(units[u])
    return columns, slots


def _per_unit(values: Tensor, slots: Tensor) -> Tensor:
    return torch.cat((values, values.new_zeros(1)))[slots].sum(1)


def _total(c: Tensor, w: Tensor) -> float:
    return float(((w @ c) * w).sum())

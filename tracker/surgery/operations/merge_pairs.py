"""Which units to fold into which: the pairs of a group that cost its consumers least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tracker.compensation.linear import constant
from tracker.errors import SurgeryError
from tracker.surgery.prices.removal_problem import Limits, Problem, problems_of
from tracker.tracker import ActivationTracker
from tracker.utils.argument_checks import fits, shown

Neuron = tuple[str, int]  # layer, local index


def require_tolerance(tolerance: float) -> None:
    """See that it is a share.

    Raises:
        SurgeryError: It is not.
    """
    if not fits(tolerance, float) or not tolerance >= 0:
        raise SurgeryError(
            f"tolerance is a share of what the consumers' outputs vary by, 0 or more, not {shown(tolerance)}."
        )


def default_pairs(
    tracker: ActivationTracker, correlation: float, tolerance: float
) -> list[tuple[Neuron, Neuron]]:
    """(keep, drop) neurons of all groups that correlate so strongly, as long as the consumers are to err by less.

    Raises:
        SurgeryError: Nothing was observed, or no pair is alike and cheap enough.
    """
    groups, problems, _ = problems_of(tracker, Limits())
    found: list[tuple[Neuron, Neuron]] = []
    for i, group in enumerate(groups):
        problem = problems.plain(i)  # the tolerance is a share of what the consumers compute
        pairs, errors = cheapest_pairs(problem, group.size, problem.total, correlation)
        for (keep, drop), error in zip(pairs, errors, strict=True):
            if error > tolerance:
                break
            found += zip(group.neurons(keep), group.neurons(drop), strict=True)
    if not found:
        raise SurgeryError(
            f"No pair of neurons correlates by {correlation:g} or more and could be folded within an error of "
            f"{tolerance:g} of what its consumers compute. Lower engine.correlation_threshold, raise tolerance, or "
            "name the pairs."
        )
    return found


def cheapest_pairs(
    problem: Problem, size: int, total: float, correlation: float
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Pairs of a group that can be folded: (keep, drop) units, cheapest first, no unit in two of them.

    With the relative error of the consumers once 1, 2, … of them are folded, `total` being what they put out.

    A unit's columns are folded each into its counterpart, by the best affine map a = cov / var. Of x_drop is left
    r = x_drop − a·x_keep, and the consumers lose tr(W_drop E[r rᵀ] W_dropᵀ). All its columns correlate by
    `correlation` or more.
    """
    c, w = problem.covariance.double(), problem.weight.double()
    columns = torch.tensor(problem.units[:size])  # (units, columns of each)
    live = ~constant(c, problem.mean)[columns].any(1)
    gram = w.T @ w
    variance = c.diagonal()[columns].clamp(min=1e-300)
    price = torch.zeros(size, size, dtype=torch.float64)  # (keep, drop)
    slopes, alike = [], live[:, None] & live
    for i, at in enumerate(columns.T):
        cross = c[at[:, None], at]
        slopes.append(cross / variance[:, i, None])
        alike &= cross.square() >= correlation**2 * variance[:, i, None] * variance[:, i]
    for i, at in enumerate(columns.T):
        for j, to in enumerate(columns.T):
            # E[rᵢ rⱼ] for every (keep, drop): of drop's own, less what keep says of either, and what it says twice.
            left = c[at, to] - slopes[i] * c[at[:, None], to] - slopes[j] * c[to[:, None], at]
            left += slopes[i] * slopes[j] * c[at, to][:, None]
            price += gram[at, to] * left
    price[~alike] = torch.inf
    price.fill_diagonal_(torch.inf)
    price[:, [u for u in problem.protected if u < size]] = torch.inf
    busy, pairs = set[int](), list[tuple[int, int]]()
    for place in price.flatten().argsort(stable=True).tolist():
        keep, drop = divmod(place, size)
        if price[keep, drop] == torch.inf:
            break
        if keep not in busy and drop not in busy:
            busy |= {keep, drop}
            pairs.append((keep, drop))
    if not pairs:
        return (), ()
    return tuple(pairs), tuple(_together(c, gram, columns, slopes, pairs, total))


def _together(
    c: Tensor,
    gram: Tensor,
    columns: Tensor,
    slopes: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    total: float,
) -> list[float]:
    """Relative errors once 1, 2, … pairs are folded, their leftovers added up with what they have in common."""
    wide = columns.shape[1]
    dropped = torch.tensor([int(columns[d, i]) for _, d in pairs for i in range(wide)])
    kept = torch.tensor([int(columns[k, i]) for k, _ in pairs for i in range(wide)])
    slope = torch.stack([slopes[i][k, d] for k, d in pairs for i in range(wide)])
    rows = c[dropped] - slope[:, None] * c[kept]
    common = rows[:, dropped] - slope * rows[:, kept]
    lost = (common * gram[dropped[:, None], dropped]).cumsum(0).cumsum(1).diagonal()
    return (lost[wide - 1 :: wide].clamp(min=0) / total).tolist()

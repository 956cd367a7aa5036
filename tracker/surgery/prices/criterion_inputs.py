"""Units in the order of another criterion than the reconstruction error: for baselines, and for users' own studies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tracker.compensation import CRITERIA, Evidence, Selection, lowest, path, scores
from tracker.compensation.criteria import Criterion
from tracker.compensation.linear import default_ridge
from tracker.errors import SurgeryError
from tracker.structure import UnitGroup
from tracker.utils.argument_checks import shown

if TYPE_CHECKING:
    from tracker.surgery.prices.removal_problem import Problem

RECONSTRUCTION = "reconstruction"  # what the consumers lose once the others take over: the default


def check_criterion(criterion: str | Criterion) -> None:
    """Refuse what is no criterion.

    Raises:
        SurgeryError: There is none of this name; the message lists them.
    """
    if not callable(criterion) and criterion not in (RECONSTRUCTION, *CRITERIA):
        names = ", ".join(map(repr, (RECONSTRUCTION, *CRITERIA)))
        raise SurgeryError(
            f"No criterion is called {criterion!r}; there are {names}. A function of tracker.compensation.Evidence "
            "will do as well."
        )


def ordered(
    held: Mapping[str, Tensor],
    group: UnitGroup,
    problem: Problem,
    criterion: str | Criterion,
    weight: Tensor,
) -> Selection:
    """The units of a group, the lowest score first, and what the consumers would lose along this order.

    held: The model's tensors. weight: Of the consumers, as it is.

    Raises:
        SurgeryError: The criterion wants gradients and there are none, or gives no score for each unit.
    """
    units = problem.units[: group.size]
    spread = problem.covariance.diagonal().clamp(min=0)
    mean = torch.zeros_like(spread) if problem.mean is None else problem.mean
    wants_gradients = criterion == "taylor" or callable(criterion)
    evidence = Evidence(
        units,
        weight=weight,
        produced=_on_columns(_norms(held, group), problem),
        variance=spread,
        activity=(spread + mean.square()).sqrt(),
        taylor=_taylor(held, group, problem, needed=criterion == "taylor")
        if wants_gradients
        else None,
    )
    values = _own(criterion, evidence) if callable(criterion) else scores(criterion, evidence)
    if values.shape != (group.size,) or bool(values.isnan().any()):
        raise SurgeryError(
            f"The criterion gave {tuple(values.shape)} scores for the {group.size} units of {group.name!r}, or NaN "
            "among them: one number for each unit is needed."
        )
    order = lowest(values, group.size, problem.protected)
    ridge = default_ridge(problem.count, len(spread))
    return path(problem.covariance, problem.weight, problem.units, order, ridge=ridge)


def _own(criterion: Criterion, evidence: Evidence) -> Tensor:
    """What a user's function makes of the evidence."""
    try:
        values: object = criterion(evidence)
    except Exception as error:
        raise SurgeryError(f"The criterion failed ({type(error).__name__}: {error}).") from error
    if not isinstance(values, Tensor):
        raise SurgeryError(
            f"A criterion gives a tensor of one number for each unit, not {shown(values)}."
        )
    return values


def _norms(held: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
    """L2 norm of what makes each unit: (units,)."""
    made = {t for (t, _), role in group.roles.items() if role == "produces"}
    return _sums(group, {name: held[name].detach().double().square() for name in made}).sqrt()


def _taylor(
    held: Mapping[str, Tensor], group: UnitGroup, problem: Problem, *, needed: bool
) -> Tensor | None:
    """Σ gradient · weight of what makes each unit, on the unit's first column: (columns,)."""
    made = [t for (t, _), role in group.roles.items() if role == "produces"]
    without = next((name for name in made if held[name].grad is None), None)
    if without is not None:
        if not needed:
            return None
        raise SurgeryError(
            f"The criterion 'taylor' reads gradients, and {without} has none: run backward() on some batches first, "
            "and do not clear them."
        )
    products = {n: held[n].detach().double() * held[n].grad.double() for n in made}  # type: ignore[union-attr]
    return _on_columns(_sums(group, products), problem)


def _sums(group: UnitGroup, values: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for (name, dim), role in group.roles.items():
        if role == "produces":
            rows = values[name].transpose(0, dim).flatten(1) if values[name].ndim > 1 else None
            each = (values[name] if rows is None else rows.sum(1)).cpu()
            total += torch.stack([each[list(unit[name, dim])].sum() for unit in group.members])
    return total


def _on_columns(values: Tensor, problem: Problem) -> Tensor:
    found = torch.zeros(len(problem.covariance), dtype=torch.float64)
    found[[columns[0] for columns in problem.units[: len(values)]]] = values
    return found

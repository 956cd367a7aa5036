"""Other criteria of what goes: plain scores per unit, the lowest of which go first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.errors import StatisticsError


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of n columns in units; a criterion takes what it needs.

    units:    columns of each unit
    weight:   (m, n): the consumers' columns
    produced: (n,): L2 norm of what produces each column
    variance: (n,)
    activity: (n,): root mean square of what is read
    taylor:   (n,): Σ gradient·weight over what belongs to each column
    seed:     of the random criterion
    """

    units: Sequence[Sequence[int]]
    weight: Tensor | None = None
    produced: Tensor | None = None
    variance: Tensor | None = None
    activity: Tensor | None = None
    taylor: Tensor | None = None
    seed: int = 0

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums of (n,) over the columns of each unit: (units,) float64."""
        return torch.stack([values[list(columns)].double().sum() for columns in self.units])


Criterion = Callable[[Evidence], Tensor]
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a function of `Evidence` → scores (units,), under `name`.

    Args:
        name: By which `compress(criterion=...)` finds it.

    Examples:
        >>> from tracker import criterion
        >>> @criterion("largest weight")
        ... def largest_weight(evidence):
        ...     return evidence.per_unit(evidence.weight.abs().amax(0))
        >>> engine.compress(0.8, criterion="largest weight", progress=False, dry_run=True).operation
        'compress'
    """

    def register(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return register


def scores(name: str, evidence: Evidence) -> Tensor:
    """Scores (units,) float64 of the criterion `name`."""
    if name not in CRITERIA:
        raise StatisticsError(f"No criterion is called {name!r}; there are {', '.join(CRITERIA)}.")
    return CRITERIA[name](evidence)


def lowest(values: Tensor, remove: int, protected: Collection[int] = ()) -> tuple[int, ...]:
    """The `remove` units with the lowest scores, lowest first; ties go to the lowest index."""
    order = values.argsort(stable=True).tolist()
    return tuple(u for u in order if u not in set(protected))[:remove]


def _need(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise StatisticsError(f"This criterion needs `{name}`, which was not given.")
    return value


@criterion("magnitude")
def magnitude(evidence: Evidence) -> Tensor:
    """L2 norm of what produces the unit; without that, of the consumers' columns."""
    if evidence.produced is not None:
        return evidence.per_unit(evidence.produced.double().square()).sqrt()
    weight = _need(evidence.weight, "weight")
    return evidence.per_unit(weight.double().square().sum(0)).sqrt()


@criterion("activity")
def activity(evidence: Evidence) -> Tensor:
    """Root mean square activation."""
    return evidence.per_unit(_need(evidence.activity, "activity"))


@criterion("fluctuation")
def fluctuation(evidence: Evidence) -> Tensor:
    """Variance times ‖w‖². Source: An et al., FLAP (AAAI 2024)."""
    norms = _need(evidence.weight, "weight").double().square().sum(0)
    return evidence.per_unit(_need(evidence.variance, "variance") * norms)


@criterion("taylor")
def taylor(evidence: Evidence) -> Tensor:
    """|Σ gradient·weight|. Source: Molchanov et al. (2019)."""
    return evidence.per_unit(_need(evidence.taylor, "taylor")).abs()


@criterion("random")
def random(evidence: Evidence) -> Tensor:
    """Uniform, the same for the same seed."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(len(evidence.units), generator=generator, dtype=torch.float64)

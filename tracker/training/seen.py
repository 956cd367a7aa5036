"""What a look saw beside what consumers read, as tensors that a checkpoint holds too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tracker.inputs.calls import Arguments
from tracker.inputs.serialized import gather_inputs, inputs_from
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.structure import UnitGroup
from tracker.surgery.calibration.growth_directions import directions_of, strengths_of

# Keys of tensors in a checkpoint.
PRODUCT, INPUT, NORM, INTO = "look.product/", "look.input/", "look.norm/", "look.into/"
BENT, FACTS, SIZE = "look.bent/", "look.facts", "look.size/"


@dataclass(slots=True)
class CollectedSignals:
    """What a look saw beside what consumers read.

    products: By layer, Σ δᵀx over its passes: see `directions_of`. into: Some rows of what these layers took.
    inputs: Of the model's passes, in order.
    readers: By layer that may grow, the weights that read it, in the order of its product.
    norms: By parameter, (2,): Σ ‖gradient‖² over its backward passes, and their number.
    bent, facts: What gradients say of the loss's curvature: see `LossWatcher`.
    sizes: By weight of a consumer, (columns + 1,): Σ |x| of what it read, and over how many rows.
    """

    products: dict[str, Tensor] = field(default_factory=dict)
    into: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Arguments] = field(default_factory=list)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    bent: dict[str, Tensor] = field(default_factory=dict)
    facts: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64))
    sizes: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self) -> dict[str, float]:
        """Mean square of the gradient by parameter, of those that got one."""
        pairs = {name: value.tolist() for name, value in self.norms.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def gains(
        self, layer: str, reads: Mapping[str, ConsumerInput], loss: float
    ) -> tuple[float, ...]:
        """Predicted relative fall of the loss by the first, second, … unit that a layer gets.

        A unit that reads along u and is read along v, the singular vectors of Σ δᵀx of strength σ, takes
        ½ σ² / (E[(u·x)²] · vᵀFv) from a loss of curvature F at its readers once its outgoing weights have learnt: the
        best step of second order. TINY (Verbockhaven et al., 2024) in the currency of removal; nonlinearities not
        counted.
        """
        product, rows, passes = self.products.get(layer), self.into.get(layer), float(self.facts[0])
        names = self.readers.get(layer, ())
        if product is None or rows is None or not passes or not loss:
            return ()
        bent = [reads[n].loss if n in reads else None for n in names]
        found = strengths_of(
            product / passes, rows, [None if b is None else b.curvature for b in bent]
        )
        return tuple((found / loss).tolist())

    def dormant(self, group: UnitGroup, threshold: float) -> list[int]:
        """Units whose mean |activation| is, for each consumer, at most a share of its group's mean; none if unknown.

        The score of ReDo (Sokar et al., 2023, arXiv:2302.12902); of several columns (a head) their mean.
        """
        places = [place for place, role in group.roles.items() if role == "reads"]
        found = set(range(group.size)) if places else set[int]()
        for place in places:
            sums = self.sizes.get(place[0])
            if sums is None or not float(sums[-1]):
                return []
            means = (sums[:-1] / sums[-1]).cpu()
            own = torch.stack([means[list(unit[place])].mean() for unit in group.members])
            found &= set((own <= threshold * own.mean()).nonzero().flatten().tolist())
        return sorted(found)

    def directions(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """Incoming weights for new units, best first, of those layers of which the gradients tell."""
        found = {n: directions_of(self.products[n]) for n in layers if n in self.products}
        return {name: best for name, best in found.items() if best is not None}

    def dump_state(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors by key, and where the inputs stand among them."""
        tables, places = gather_inputs((tuple(tuple(pair) for pair in self.inputs), {}))
        products = {PRODUCT + name: value.cpu() for name, value in self.products.items()}
        for kind, mine in self._tables():
            products |= {kind + name: value.cpu() for name, value in mine.items()}
        products[FACTS] = self.facts
        return {**products, **{INPUT + key: value for key, value in tables.items()}}, places

    def restore_state(self, tables: Mapping[str, Tensor], places: Any) -> None:
        """Have seen this already.

        Raises:
            KeyError, TypeError, ValueError: It is nothing that `dump_state` gave.
        """
        for kind, mine in ((PRODUCT, self.products), *self._tables()):
            for key, value in tables.items():
                name = key.removeprefix(kind)
                if name == key or name not in mine:
                    continue  # of another kind, or it is not looked at any more
                if mine[name].shape != value.shape:
                    raise ValueError(f"what was seen of {name} has another shape")
                mine[name].copy_(value)
        if FACTS in tables:
            self.facts.copy_(tables[FACTS].view(7))
        mine = {k.removeprefix(INPUT): v for k, v in tables.items() if k.startswith(INPUT)}
        passes = inputs_from(mine, places)
        self.inputs[:] = [Arguments(*pair) for pair in passes[0]] if passes is not None else []  # type: ignore[misc]

    def _tables(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return (
            (NORM, self.norms),
            (INTO, self.into),
            (BENT, self.bent),
            (SIZE, self.sizes),
        )


NOTHING_SEEN = CollectedSignals()

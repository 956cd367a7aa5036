"""What a change would do, as a frozen value: drawn from the structure, touching no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracker.errors import SurgeryError
from tracker.structure import Structure, UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.code_sizes.size_equations import UnsolvableError
from tracker.structure.code_sizes.traced_int import Attribute
from tracker.surgery.loss_change import LossForecast
from tracker.utils.slotmap import SlotMap


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Columns of a consumer take over what others did.

    W[…, target] += W[…, source] @ matrix, and b += W[…, source] @ shift.

    tensor, dim: The consumer's weight, and its dimension that reads. `across`: the one of its outputs.
    source, target: (r,) and (k,) indices along `dim`, as before the change. Where `kernel_positions` is not 1, they are
        indices of columns, and each index along `dim` has `kernel_positions` of them.
    matrix: (r, k) float64. shift: (r,) float64, the constant part, for the consumer's `bias`.
    """

    tensor: str
    dim: int
    across: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    matrix: Tensor
    bias: str | None
    shift: Tensor
    kernel_positions: int = 1

    def columns(self, weight: Tensor) -> Tensor:
        """`weight` with its columns last: (…, columns), a view where `kernel_positions` is not 1."""
        return weight.movedim(self.dim, -1) if self.kernel_positions == 1 else weight.flatten(1)

    def weight(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """The weight of these columns."""
        return columns.movedim(-1, self.dim) if self.kernel_positions == 1 else columns.view(shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which slots of which tensors stay, go and come, and what the rest takes over."""

    choice: tuple[tuple[UnitGroup, tuple[int, ...]], ...]  # units that go
    tensors: Mapping[str, Mapping[int, SlotMap]]
    layers: Mapping[str, SlotMap]  # tracked layers that lose or gain neurons
    removed_ids: tuple[int, ...]
    shapes: Mapping[str, torch.Size]  # of the model that the plan was drawn for
    operation: str = "prune_units"
    promise: str = "masked"
    mixes: tuple[WeightUpdate, ...] = ()
    # Content of fresh slots: tensors of the new shape, zero elsewhere.
    fresh: Mapping[str, Tensor] = field(default_factory=dict)
    # Dimensions of tensors along which fresh slots are made, and not read: for the optimizer's moments.
    made: Mapping[str, frozenset[int]] = field(default_factory=dict)
    # How much stronger a tensor's slots along a dimension act from now on: for the optimizer's moments.
    gains: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    attributes: Mapping[Attribute, int] = field(default_factory=dict)  # integers of its code

    # Modules that take the place of others, or, under a name that ends in "inserted", stand behind their parent.
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    outlook: LossForecast | None = None  # what it is predicted to cost, and measured

    @property
    def touched(self) -> dict[str, Mapping[int, SlotMap]]:
        """Every tensor that gets new content, with the slots that move."""
        rewritten: dict[str, Mapping[int, SlotMap]] = {
            name: {} for name in (*sorted(self.rewritten), *self.fresh)
        }
        return {**rewritten, **self.tensors}

    @property
    def rewritten(self) -> set[str]:
        """Tensors of which kept values change."""
        weights = {mix.tensor for mix in self.mixes if bool(mix.matrix.any())}
        return weights | {m.bias for m in self.mixes if m.bias is not None and bool(m.shift.any())}

    @property
    def only_removes(self) -> bool:
        """Whether units go and nothing comes in their place."""
        slots = (s for dims in self.tensors.values() for s in dims.values())
        return bool(self.choice) and not self.modules and all(None not in s.source for s in slots)

    @property
    def units(self) -> dict[str, list[int]]:
        """Group name → units that go."""
        return {group.name: list(units) for group, units in self.choice}


def plan_removal(
    model: nn.Module,
    structure: Structure,
    units: Mapping[str, Sequence[int]],
    layer_sizes: Mapping[str, int],
) -> Plan:
    """The plan that removes `units` ({group name: unit indices}).

    Raises:
        SurgeryError: A group is unknown, cannot be pruned, or would lose its last unit, or an integer of the model's
            code cannot follow; the message says why.
    """
    groups = {group.name: group for group in structure.groups}
    choice = tuple(
        (_prunable(groups, name), _chosen(groups[name], asked))
        for name, asked in units.items()
        if asked
    )
    if not choice:
        raise SurgeryError(
            "Nothing was asked to be removed: name units, as {group name: [unit indices]}."
        )
    shapes = {n: t.shape for n, t in tensors(model).items()}
    gone: dict[str, dict[int, set[int]]] = {}
    lost: dict[str, set[int]] = {}
    for group, chosen in choice:
        for part in group.all_slices(chosen):
            gone.setdefault(part.tensor, {}).setdefault(part.dim, set()).update(part.indices)
        for unit in chosen:
            for layer, index in group.neurons(unit):
                if layer in layer_sizes:
                    lost.setdefault(layer, set()).add(index)
    for name, dims in gone.items():
        for dim, indices in dims.items():
            if len(indices) >= shapes[name][dim]:
                raise SurgeryError(
                    f"Nothing would be left of dimension {dim} of {name}: at least 1 must remain."
                )
    attributes = _solved(structure, choice)
    ids = choice[0][0].ids
    return Plan(
        choice,
        {
            name: {d: SlotMap.dropping(shapes[name][d], indices) for d, indices in dims.items()}
            for name, dims in gone.items()
        },
        {layer: SlotMap.dropping(layer_sizes[layer], indices) for layer, indices in lost.items()},
        tuple(sorted(ids[layer, i] for layer, indices in lost.items() for i in indices)),
        shapes,
        promise="masked" if all(group.exact for group, _ in choice) else "changed",
        attributes=attributes,
    )


def units_of(structure: Structure, neurons: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """The units that comprise exactly these neurons, given as (layer, local index).

    Raises:
        SurgeryError: A neuron is in no prunable unit, or its unit comprises neurons of its layer that were not named.
    """
    asked = list(neurons)
    if len(set(asked)) < len(asked):
        twice = next(n for n in asked if asked.count(n) > 1)
        raise SurgeryError(f"Neuron {twice[1]} of layer {twice[0]!r} is named twice.")
    named, found = set(asked), dict[str, list[int]]()
    where: dict[tuple[str, int], list[tuple[UnitGroup, int]]] = {}
    for group in structure.groups:
        for unit in range(group.size):
            for neuron in group.neurons(unit):
                where.setdefault(neuron, []).append((group, unit))
    for layer, index in asked:
        homes = [(g, u) for g, u in where.get((layer, index), []) if g.prunable]
        if not homes:
            raise SurgeryError(
                f"Neuron {index} of layer {layer!r} cannot be removed: {_obstacle(structure, where, layer, index)}"
            )
        whole = [(g, u) for g, u in homes if {n for n in g.neurons(u) if n[0] == layer} <= named]
        if not whole:
            group, unit = homes[0]
            mates = [i for name, i in group.neurons(unit) if name == layer]
            raise SurgeryError(
                f"Neuron {index} of layer {layer!r} cannot go alone: it is part of unit {unit} of group "
                f"{group.name!r}, with neurons {mates[:12]} of its layer. Name them all, or use prune_units."
            )
        group, unit = whole[0]
        units = found.setdefault(group.name, [])
        if unit not in units:
            units.append(unit)
    return found


def _solved(
    structure: Structure, choice: Sequence[tuple[UnitGroup, Sequence[int]]]
) -> dict[Attribute, int]:
    try:
        return structure.integers.solve(choice)
    except UnsolvableError as error:
        steps = [f"{g.multiple_of} units of {g.name!r}" for g, _ in choice if g.multiple_of > 1]
        help_ = f" Multiples of {', '.join(steps)} can go." if steps else ""
        names = ", ".join(repr(group.name) for group, _ in choice)
        raise SurgeryError(
            f"These units of {names} cannot be removed, the model's code does not follow: {error}.{help_}"
        ) from error


def _prunable(groups: Mapping[str, UnitGroup], name: str) -> UnitGroup:
    if name not in groups:
        some = ", ".join(map(repr, list(groups)[:8])) or "none"
        raise SurgeryError(f"There is no group {name!r}. Groups: {some}.")
    group = groups[name]
    if not group.prunable:
        raise SurgeryError(f"Group {name!r} cannot be pruned: {group.reason}.")
    return group


def _chosen(group: UnitGroup, asked: Sequence[int]) -> tuple[int, ...]:
    for unit in asked:
        if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < group.size:
            raise SurgeryError(
                f"Group {group.name!r} has no unit {unit!r}: its units are 0 to {group.size - 1}."
            )
    if len(set(asked)) < len(asked):
        raise SurgeryError(f"A unit of group {group.name!r} is named twice: {list(asked)}.")
    if len(asked) >= group.size:
        raise SurgeryError(
            f"Cannot remove all {group.size} units of {group.name!r}: at least 1 must remain."
        )
    return tuple(sorted(asked))


def _obstacle(
    structure: Structure,
    where: Mapping[tuple[str, int], list[tuple[UnitGroup, int]]],
    layer: str,
    index: int,
) -> str:
    for group, _ in where.get((layer, index), []):
        return f"group {group.name!r} is not prunable: {group.reason}."
    for frozen in structure.frozen:
        if frozen.tensor.rpartition(".")[0] == layer and frozen.dim == 0:
            return f"{frozen.reason}."
    return "no group of units comprises it. print(engine.structure) shows the groups."

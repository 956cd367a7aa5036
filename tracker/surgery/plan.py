"""What a removal would change, as a frozen value: drawn from the structure, touching no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tracker.errors import SurgeryError
from tracker.slotmap import SlotMap
from tracker.structure import Structure, UnitGroup


@dataclass(frozen=True, slots=True)
class Plan:
    """Which slots of which tensors, and which neurons of which layers, stay."""

    choice: tuple[tuple[UnitGroup, tuple[int, ...]], ...]
    tensors: Mapping[str, Mapping[int, SlotMap]]
    layers: Mapping[str, SlotMap]  # tracked layers that lose neurons
    removed_ids: tuple[int, ...]
    shapes: Mapping[str, torch.Size]  # of the model that the plan was drawn for

    @property
    def promise(self) -> str:
        """What the outputs will be: equal to the masked model's, where every group says so."""
        return "masked" if all(group.exact for group, _ in self.choice) else "changed"

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
        SurgeryError: A group is unknown, cannot be pruned, or would lose its last unit; the message says why.
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
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    gone: dict[str, dict[int, set[int]]] = {}
    lost: dict[str, set[int]] = {}
    for group, chosen in choice:
        for part in group.slices(chosen):
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

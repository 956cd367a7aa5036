"""From labels to what a user can remove: units, in groups of alternatives, and the slices of tensors they lie in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from tracker.errors import SurgeryError
from tracker.modules.kinds import kind_of, layer_of
from tracker.structure.axes import Labels
from tracker.structure.read_points import made_axis
from tracker.structure.trace import Trace

Place = tuple[str, int]  # a tensor's key in the state dict, and a dimension
Units = tuple[dict[Place, tuple[int, ...]], ...]  # for each unit, the indices of each place
Unit = tuple[dict[Place, tuple[int, ...]], tuple[tuple[str, int], ...]]  # and its neurons


@dataclass(frozen=True, slots=True)
class Slice:
    """Indices of one dimension of one tensor.

    Attributes:
        tensor: A key of the model's `state_dict`.
        dim: Of the tensor.
        indices: Along the dimension.
        role: "produces" (rows that make the units), "carries" (values on their way, one each), or "reads" (columns that
            consume them).

    Examples:
        >>> for part in engine.structure["0"].slices([3]):
        ...     print(part.tensor, part.dim, part.indices, part.role)
        0.weight 0 (3,) produces
        0.bias 0 (3,) produces
        2.weight 1 (3,) reads
    """

    tensor: str
    dim: int
    indices: tuple[int, ...]
    role: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """A dimension of which nothing (or not everything) can be removed, and the operation that stands in the way.

    Attributes:
        tensor: A key of the model's `state_dict`.
        dim: Of the tensor.
        reason: The operation, and where in the model it is called.

    Examples:
        >>> place = engine.structure.frozen[-1]
        >>> place.tensor, place.dim, place.reason
        ('4.bias', 0, "it is part of the model's output")
    """

    tensor: str
    dim: int
    reason: str


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Units that are alternatives to each other: the neurons of a layer, say, or the channels of a residual stream.

    Attributes:
        name: Unique, and the same in each trace of one architecture.
        kind: "neuron", "channel", "head", "residual" and others.
        prunable: Whether units of it can go.
        reason: Why they cannot, or "".
        exact: Whether a removal equals the masked model.
        inexact_reason: What sees a removal otherwise, or "".
        layers: Names of those that produce the units.
        members: By unit, its indices of each dimension of each tensor.
        roles: Of each dimension of each tensor, as in `Slice`.
        owned: By unit, its neurons as (layer, index).
        multiple_of: Units that must go at a time.
        ids: (layer, index) → neuron id.
        unsaved: Tensors of the members that are in no state dict.

    Examples:
        >>> group = engine.structure["0"]
        >>> group.size, group.exact, group.neuron_ids(3)
        (8, True, (3,))
    """

    name: str
    kind: str
    prunable: bool
    reason: str  # why not, or ""
    exact: bool  # removal equals the masked model
    inexact_reason: str
    layers: tuple[str, ...]  # that produce the units
    members: Units = field(repr=False)
    roles: dict[Place, str] = field(repr=False)
    owned: tuple[tuple[tuple[str, int], ...], ...] = field(repr=False)  # neurons of each unit
    multiple_of: int = 1
    ids: Mapping[tuple[str, int], int] = field(default_factory=dict, repr=False)
    unsaved: frozenset[str] = frozenset()  # tensors of the members that are in no state dict

    @property
    def size(self) -> int:
        """Units of the group."""
        return len(self.members)

    def slices(self, units: Iterable[int]) -> list[Slice]:
        """What has to go with these units: one slice for each dimension of each tensor of the state dict.

        Args:
            units: Of this group.

        Raises:
            SurgeryError: There is no such unit.
        """
        return [part for part in self.all_slices(units) if part.tensor not in self.unsaved]

    def all_slices(self, units: Iterable[int]) -> list[Slice]:
        """The same, with buffers that are in no state dict.

        Args:
            units: Of this group.
        """
        chosen = list(dict.fromkeys(units))
        for unit in chosen:
            if not isinstance(unit, int) or not 0 <= unit < self.size:
                raise SurgeryError(
                    f"Group {self.name!r} has no unit {unit!r}: its units are 0 to {self.size - 1}."
                )
        places = self.members[0] if self.members else {}
        return [
            Slice(
                t,
                d,
                tuple(sorted(i for u in chosen for i in self.members[u][t, d])),
                self.roles[t, d],
            )
            for t, d in places
        ]

    def neurons(self, unit: int) -> tuple[tuple[str, int], ...]:
        """(layer, local index) of the neurons that a unit comprises: those that make it, and norms on its way.

        Args:
            unit: Of this group.
        """
        return self.owned[unit]

    def neuron_ids(self, unit: int) -> tuple[int, ...]:
        """Ids of the neurons that a unit comprises; none where the structure was traced without an engine.

        Args:
            unit: Of this group.
        """
        return tuple(sorted(self.ids[n] for n in self.neurons(unit) if n in self.ids))


def find_groups(trace: Trace) -> tuple[list[UnitGroup], list[Frozen]]:
    """Groups of units, in the order in which the forward pass meets them, and all that is frozen."""
    labels = trace.labels
    trace.weights.mark_inexact(labels, trace.parameters)
    owners = _owners(trace)
    members: dict[int, dict[Place, list[int]]] = {}
    weights = {name for name, _ in trace.model.named_parameters(remove_duplicate=False)}
    frozen: dict[Place, str] = {}
    for name in trace.order:
        for dim, axis in enumerate(trace.parameters[name]):
            if axis is None:
                continue
            lying, why = _lying(labels, axis)
            if why:
                frozen[name, dim] = why
            for label, indices in lying.items():
                members.setdefault(label, {})[name, dim] = indices
    alike: dict[tuple[object, ...], list[int]] = {}
    for label, places in members.items():
        # What lies in buffers alone (positions of a mask that this input did not reach) is no unit.
        if any(tensor in weights for tensor, _ in places):
            shape = (*places, *map(len, places.values()))
            alike.setdefault((shape, label in labels.inexact), []).append(label)
    groups = []
    for family in alike.values():
        units = [
            (
                dict(zip(members[label], map(tuple, members[label].values()), strict=True)),
                tuple(sorted(owners.get(label, ()))),
            )
            for label in family
        ]
        inexact = labels.inexact.get(family[0], "")
        summed = family[0] in labels.summed
        groups += [_group(trace, each, inexact, summed) for each in _disjoint(units)]
    saved = trace.model.state_dict().keys()
    groups = [replace(g, unsaved=frozenset(t for t, _ in g.roles) - saved) for g in groups]
    return _named(groups), [Frozen(t, d, why) for (t, d), why in frozen.items()]


def _lying(labels: Labels, axis: np.ndarray) -> tuple[dict[int, list[int]], str]:
    """The indices of each label that can die, and why the first index that cannot does not, or ""."""
    frozen, why = labels.frozen, ""
    found: dict[int, list[int]] = {}
    single = labels.simple(axis) if axis.shape[1] == 1 else None
    if single is not None:
        for index, label in enumerate(single[:, 0].tolist()):
            if label in frozen:
                why = why or frozen[label]
            elif label:
                found.setdefault(label, []).append(index)
        return found, why
    for index, row in enumerate(labels.rows(axis)):
        if row and row <= frozen.keys():
            why = why or frozen[min(row)]
        for label in row:
            if label not in frozen:
                found.setdefault(label, []).append(index)
    return found, why


def coverage(model: nn.Module, groups: Iterable[UnitGroup]) -> float:
    """Share of the model's parameters that lie in prunable groups."""
    removable: dict[Place, set[int]] = {}
    for group in groups:
        for unit in group.members if group.prunable else ():
            for place, indices in unit.items():
                removable.setdefault(place, set()).update(indices)
    covered = total = 0.0
    for name, parameter in model.named_parameters():
        sizes = enumerate(parameter.shape)
        stays = math.prod(1 - len(removable.get((name, d), ())) / max(n, 1) for d, n in sizes)
        covered += parameter.numel() * (1 - stays)
        total += parameter.numel()
    return covered / total if total else 0.0


def _disjoint(units: list[Unit]) -> list[list[Unit]]:
    """Heads and head dimensions may lie in the same places: units of one group share no index."""
    rooms: list[tuple[set[int], list[Unit]]] = []
    for unit in units:
        indices = next(iter(unit[0].values()))
        for taken, members in rooms:
            if taken.isdisjoint(indices):
                taken.update(indices)
                members.append(unit)
                break
        else:
            rooms.append((set(indices), [unit]))
    return [members for _, members in rooms]


def _owners(trace: Trace) -> dict[int, set[tuple[str, int]]]:
    """Label → the neurons, (layer, local index), that die with it.

    They lie in a layer's output; of a layer whose weights alone are used, in these.
    """
    for name, layer in trace.outputs.layers.items():
        if name not in trace.outputs.axes:
            axis = made_axis(trace, name, layer.module)
            if axis is not None and layer.neurons == len(axis):
                trace.outputs.axes[name] = [axis]
    return trace.outputs.neurons(trace.labels)


def _group(trace: Trace, found: list[Unit], inexact: str, summed: bool) -> UnitGroup:
    units = tuple(members for members, _ in found)
    roles = {place: _role(trace, place) for place in units[0]}
    layers = tuple(
        dict.fromkeys(layer_of(t) for (t, _), role in roles.items() if role == "produces")
    )
    lonely = len(units) < 2
    return UnitGroup(
        name=layers[0] if layers else units_place(units[0]),
        kind=_kind(trace.model, units, roles, layers, summed),
        prunable=not lonely,
        reason="a single unit: the last one cannot go" if lonely else "",
        exact=not inexact,
        inexact_reason=inexact,
        layers=layers,
        members=units,
        roles=roles,
        owned=tuple(neurons for _, neurons in found),
    )


def units_place(unit: dict[Place, tuple[int, ...]]) -> str:
    """A name for units that no layer makes: the first tensor that they lie in."""
    return next(iter(unit))[0]


def _role(trace: Trace, place: Place) -> str:
    if place in trace.reads:
        return "reads"
    tensor, _ = place
    # A bias is added element by element too, but belongs to what the layer makes.
    return "carries" if tensor in trace.carries and not _is_made(trace, tensor) else "produces"


def _is_made(trace: Trace, tensor: str) -> bool:
    """Bias of a layer with a weight that is multiplied, or raw parameters that are the only maker."""
    layer = layer_of(tensor)
    return any(layer_of(t) == layer and t != tensor for t, _ in trace.reads)


def _kind(
    model: nn.Module, units: Units, roles: dict[Place, str], layers: tuple[str, ...], summed: bool
) -> str:
    modules = [model.get_submodule(layer) for layer in layers]
    kinds = {m: kind.unit for m in modules if (kind := kind_of(m)) is not None}
    if "hidden" in kinds.values():
        return "hidden"
    made = [place for place, role in roles.items() if role == "produces"]
    read = [len(units[0][p]) for p, role in roles.items() if role == "reads"]
    widest = max(made, key=lambda place: len(units[0][place]), default=None)
    if widest is not None and len(units[0][widest]) > 1 and max(read, default=2) > 1:
        if any(kinds.get(m) == "channel" and getattr(m, "groups", 1) > 1 for m in modules):
            return "group"
        return "head" if _is_block(units, widest) else "head_dim"
    if summed and len(layers) > 1:
        return "residual"
    if modules and kinds.get(modules[0]) == "embedding":
        return "embedding"
    return "channel" if "channel" in kinds.values() else "neuron"


def _is_block(units: Units, place: Place) -> bool:
    """Units lie one behind the other, each a run of indices: heads, and not their dimensions."""
    first = units[0][place]
    run = 1
    while run < len(first) and first[run] == first[run - 1] + 1:
        run += 1
    runs = len(first) // run
    behind = len(units) < 2 or units[1][place][0] - first[0] == run
    return run > 1 and behind and (run > 2 or run > runs)


def _named(groups: list[UnitGroup]) -> list[UnitGroup]:
    """Unique names, stable for one architecture: the first layer that makes the units, counted where it recurs."""
    mates: dict[str, list[UnitGroup]] = {}
    for group in groups:
        mates.setdefault(group.name, []).append(group)
    # Heads and their dimensions are found in any order, and must not change places from one trace to the next.
    for same in mates.values():
        same.sort(key=lambda g: (g.kind, tuple(next(iter(g.members[0].values())))))
    seen: Counter[str] = Counter()
    named = []
    for name in [group.name for group in groups]:
        group = mates[name][seen[name]]
        seen[name] += 1
        suffix = f"#{seen[name]}" if len(mates[name]) > 1 else ""
        named.append(replace(group, name=(name or "model") + suffix))
    return named

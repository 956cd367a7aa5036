"""Equal widths: groups of one kind in repeated blocks, brought to one size."""

from __future__ import annotations

import re
from itertools import takewhile

from torch import nn

from tracker.errors import SurgeryError
from tracker.structure import Structure, UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery.operations.growth import plan_expansion
from tracker.surgery.operations.removal import plan_pruning
from tracker.surgery.plan import Plan
from tracker.surgery.prices.removal_problem import Limits, chosen_units, problems_of
from tracker.tracker import ActivationTracker

# What tells groups of one kind from others: tensors, dimensions, roles, and shapes but for the units.
Kind = tuple[tuple[str, int, str, tuple[int, ...]], ...]
# Of a group: its kind as structure has it, and the first layer that makes it. Names may change places in a new trace.
Key = tuple[str, str]


def key_of(group: UnitGroup) -> Key:
    """By what a group is found again after others changed."""
    return group.kind, group.layers[0] if group.layers else group.name


def kind_of(group: UnitGroup, model: nn.Module) -> Kind | None:
    """The kind of a group that lies within one of several numbered blocks; None for others."""
    names = [name.split(".") for name, _ in group.roles]
    block = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*names, strict=False))]
    if not any(part.isdecimal() for part in block):
        return None
    held = tensors(model)
    found = []
    for (name, dim), role in group.roles.items():
        rest = tuple(n for d, n in enumerate(held[name].shape) if (name, d) not in group.roles)
        within = ".".join(re.sub(r"^\d+$", "*", part) for part in block)
        own = ".".join(name.split(".")[len(block) :])
        found.append((f"{within}.{own}", dim, role, rest))
    return tuple(sorted(found))


def widths_to_equalize(structure: Structure, model: nn.Module, *, widest: bool) -> dict[Key, int]:
    """Groups that are not as wide as the widest (or the narrowest) of their kind, with the units they should have."""
    kinds: dict[tuple[str, Kind], list[UnitGroup]] = {}
    for group in structure.groups:
        kind = kind_of(group, model)
        if kind is not None and group.prunable:
            kinds.setdefault((group.kind, kind), []).append(group)
    wanted: dict[Key, int] = {}
    for groups in kinds.values():
        target = (max if widest else min)(group.size for group in groups)
        wanted |= {key_of(group): target for group in groups if group.size != target}
    return wanted


def plan_width(
    tracker: ActivationTracker, key: Key, units: int, seed: int
) -> tuple[Plan, list[str]]:
    """The plan that gives a group so many units: fresh ones that nothing reads, or without those that matter least.

    Raises:
        SurgeryError: It cannot grow or shrink; the message says why.
    """
    group = next((g for g in tracker.structure().groups if key_of(g) == key), None)
    if group is None:
        raise SurgeryError(
            f"No {key[0]} group of {key[1]!r} is left to be made {units} units wide."
        )
    name = group.name
    if units > group.size:
        made = [layer for layer, _ in group.neurons(0)]
        own = [n for n in made if n in group.layers] or made
        if not own or not group.exact:
            why = group.inexact_reason or "no layer's neurons are its units"
            raise SurgeryError(f"Group {name!r} cannot grow to {units} units: {why}.")
        count = (units - group.size) * own.count(own[0])
        return plan_expansion(tracker, own[0], count, None, seed, group), []
    groups, problems, left_out = problems_of(tracker, Limits())
    index = next((i for i, g in enumerate(groups) if g.name == name), None)
    if index is None:
        raise SurgeryError(f"Group {name!r} cannot shrink to {units} units: {'; '.join(left_out)}.")
    order = problems[index].backward().order
    gone = chosen_units(problems, index, group, group.size - units, order)
    return plan_pruning(tracker, {name: gone}, compensate=True)

"""The structure of one model, traced; readable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from tracker.errors import StructureError
from tracker.probe import Arguments, ExampleInputs
from tracker.structure.rules import apply_rule
from tracker.structure.taps import Tap, find_taps
from tracker.structure.trace import record
from tracker.structure.trial import try_groups
from tracker.structure.units import Frozen, UnitGroup, coverage, find_groups


@dataclass(frozen=True, slots=True)
class Structure:
    """Groups of units that can be removed, and what cannot."""

    groups: list[UnitGroup]
    frozen: list[Frozen]
    coverage: float  # share of the model's parameters that lie in prunable groups
    operations: int  # seen in the forward pass
    taps: Mapping[str, Tap]  # layer → where its neurons are read

    def with_ids(self, ids: Mapping[tuple[str, int], int]) -> Structure:
        """The same structure, its units knowing the ids of their neurons: ids of (layer, local index)."""
        return replace(self, groups=[replace(group, ids=ids) for group in self.groups])

    def __getitem__(self, name: str) -> UnitGroup:
        """The group of this name."""
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(g.name for g in self.groups[:8])
        raise KeyError(f"There is no group {name!r}. Groups: {names}.")

    def __str__(self) -> str:
        """A table for people."""
        head = f"{'group':<28} {'kind':<10} {'units':>6}  {'exact':<6} {'made by -> read by'}"
        lines = [
            f"{len(self.groups)} groups, {self.coverage:.1%} of the parameters prunable",
            head,
            "-" * 100,
        ]
        lines += [_row(group) for group in self.groups]
        reasons: dict[str, list[str]] = {}
        for f in self.frozen:
            reasons.setdefault(f.reason, []).append(f"{f.tensor}[{f.dim}]")
        if reasons:
            lines += ["", "frozen:"]
        for reason, places in reasons.items():
            more = f" and {len(places) - 4} more" if len(places) > 4 else ""
            lines.append(f"  {', '.join(places[:4])}{more}: {reason}")
        return "\n".join(lines)


def trace_structure(
    model: nn.Module, example_inputs: ExampleInputs | Arguments, *, trial: bool = True
) -> Structure:
    """Find the structure of `model` by one forward pass; the model is as before afterwards.

    Args:
        model: Any module that runs eagerly.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, or one tensor.
        trial: Remove a part of each group from a copy in float64 and compare it with the masked model; what fails is
            not prunable. Without it, what the model's code does with its own integers goes unseen.

    Raises:
        StructureError: The model is lazy, scripted or without data, or the forward pass fails.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            state = "not materialised yet" if nn.parameter.is_lazy(tensor) else "on the meta device"
            raise StructureError(
                f"The structure cannot be traced: {name} is {state}. Run the model once on real data first."
            )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                f"The structure cannot be traced: {name or 'the model'} is scripted."
            )
    trace = record(model, example_inputs, apply_rule)
    groups, frozen = find_groups(trace)
    if trial:
        groups = try_groups(model, example_inputs, groups)
    return Structure(groups, frozen, coverage(model, groups), trace.operations, find_taps(trace))


def _row(group: UnitGroup) -> str:
    made = ", ".join(group.layers) or "-"
    read = ", ".join(
        dict.fromkeys(
            t.rpartition(".")[0] or t for (t, _), r in group.roles.items() if r == "reads"
        )
    )
    note = "" if group.prunable else f"  ({group.reason})"
    if group.inexact_reason:
        note += f"  ({group.inexact_reason})"
    exact = "yes" if group.exact else "no"
    return f"{group.name:<28} {group.kind:<10} {group.size:>6}  {exact:<6} {made} -> {read or '-'}{note}"

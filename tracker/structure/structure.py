"""The structure of one model, traced; readable."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from tracker.errors import StructureError
from tracker.inputs.calls import Arguments, Call, ExampleInputs, calls_of
from tracker.inputs.forward_pass import gc_paused
from tracker.structure.code_sizes.int_recorder import IntRecorder
from tracker.structure.code_sizes.size_equations import Integers, couple
from tracker.structure.code_sizes.traced_int import instrumented_copy
from tracker.structure.picture import draw
from tracker.structure.read_points import ReadPoint, find_read_points
from tracker.structure.rule_failures import RuleFailure
from tracker.structure.rules.registry import apply_rule
from tracker.structure.trace import CallKey, Passes, Trace, record
from tracker.structure.trials.float64_mode import Precision
from tracker.structure.trials.op_stream import Forecast
from tracker.structure.trials.trial import try_groups
from tracker.structure.units import Frozen, UnitGroup, coverage, find_groups
from tracker.structure.unseen import owners, refuse_unseen, unseen_in, without
from tracker.utils.files import write_picture
from tracker.utils.notebook import as_html
from tracker.utils.text import fitting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Structure:
    """Groups of units that can be removed, and what cannot.

    Attributes:
        groups: Units that are alternatives to each other.
        frozen: Dimensions of which nothing can go, and why.
        coverage: Share of the model's parameters that lie in prunable groups.
        operations: Seen in the forward pass.
        flops: Of the same pass, by torch's formulas.
        read_points: Layer → where its neurons are read.
        integers: Of the model's own code.
        forecast: Sizes after a removal.
        passes: The calls it was found by.
        unseen: Names of the parameters that none of them ran.
        unseen_modules: Modules that these make up as a whole, else single parameters, and how many numbers each holds.
        assumed: Those of them that the user says nothing runs.
        precision: In which dtypes removals are tried.
        failures: Rules of the user's that raised.

    Examples:
        >>> structure = engine.structure
        >>> [(group.name, group.size, group.prunable) for group in structure.groups]
        [('0', 8, True), ('2', 6, True)]
        >>> structure.unseen
        ()
    """

    groups: list[UnitGroup]
    frozen: list[Frozen]
    coverage: float  # share of the model's parameters that lie in prunable groups
    operations: int  # seen in the forward pass
    flops: int  # of the same pass, by torch's formulas
    read_points: Mapping[str, ReadPoint] = field(
        default_factory=dict
    )  # layer → where its neurons are read
    integers: Integers = field(default_factory=Integers, repr=False)  # of the model's own code
    forecast: Forecast = field(default_factory=Forecast, repr=False)  # sizes after a removal
    passes: Passes = field(default_factory=Passes, repr=False)  # the calls it was found by
    unseen: tuple[str, ...] = ()  # names of the parameters that none of them ran
    # The modules that these make up as a whole, else single parameters, and how many numbers each holds.
    unseen_modules: Mapping[str, int] = field(default_factory=dict, repr=False)
    assumed: tuple[str, ...] = ()  # those of them that the user says nothing runs
    precision: Precision = field(default_factory=Precision)  # in which dtypes removals are tried
    failures: Sequence[RuleFailure] = ()  # users' rules that raised

    def with_ids(self, ids: Mapping[tuple[str, int], int]) -> Structure:
        """The same structure, its units knowing the ids of their neurons: ids of (layer, local index).

        Args:
            ids: (layer, index) → neuron id.
        """
        groups = [replace(group, ids=ids, roles=dict(group.roles)) for group in self.groups]
        return replace(
            self, groups=groups, frozen=list(self.frozen), read_points=dict(self.read_points)
        )

    def __getitem__(self, name: str) -> UnitGroup:
        """The group of this name."""
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(g.name for g in self.groups[:8])
        raise KeyError(f"There is no group {name!r}. Groups: {names}.")

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A picture of the groups, for small models; written to `path`, if there is one.

        Layers from left to right; a ribbon for each group, past what makes, carries and reads it. What cannot go is
        grey.

        Args:
            path: File for the picture; None: it is only returned.

        Raises:
            StructureError: The model has too many layers for a picture.
            WriteError: It cannot be written.
        """
        sizes = {place: len(axis) for place, axis in self.integers.places.items()}
        fig = draw(self.groups, self.frozen, sizes)
        if path is not None:
            write_picture(path, fig)
        return fig

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        """A table for people."""
        head = f"{'group':<28} {'kind':<10} {'units':>6}  {'exact':<6} {'made by -> read by'}"
        lines = [
            f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}, {self.coverage:.1%} of the parameters prunable",
            head,
            "-" * 100,
        ]
        lines += [_row(group) for group in self.groups]
        if not self.precision.in_float64:
            lines += ["", f"compared {self.precision}"]
        if self.failures:
            lines += ["", *(f"not understood, because {failure.why}" for failure in self.failures)]
        reasons: dict[str, list[str]] = {}
        for f in self.frozen:
            reasons.setdefault(f.reason, []).append(f"{f.tensor}[{f.dim}]")
        if reasons:
            lines += ["", "frozen:"]
        for reason, places in reasons.items():
            more = f" and {len(places) - 4} more" if len(places) > 4 else ""
            lines.append(f"  {', '.join(places[:4])}{more}: {reason}")
        if self.unseen_modules:
            lines += ["", "run by no example call:"]
        for name, n in self.unseen_modules.items():
            assumed = "" if name not in self.assumed else ", assumed to be run by nobody"
            lines.append(f"  {name}: {n:,} parameters{assumed}")
        if self.passes.failed:
            lines += ["", "calls that could not be made:"]
        lines += [f"  {call}: {why}" for call, why in self.passes.failed]
        return "\n".join(map(fitting, lines))

    @property
    def gaps(self) -> list[str]:
        """What no example call showed, in sentences."""
        said = []
        if unknown := [name for name in self.unseen_modules if name not in self.assumed]:
            said.append(
                f"run by no example call: {_some(unknown)}; what these could read or make is left as it is"
            )
        if self.assumed:
            said.append(f"assumed to be run by nobody: {_some(self.assumed)}")
        return said + [
            f"{call} could not be run ({why}): what it does is not known"
            for call, why in self.passes.failed
        ]


@gc_paused()
def trace_structure(
    model: nn.Module,
    example_inputs: ExampleInputs | Arguments | Sequence[Call],
    *,
    assume_unread: Collection[str] = (),
    trial: bool = True,
    axes: Mapping[str, int] | None = None,
) -> Structure:
    """Find the structure of `model` by calls of it, in eval and in train mode; the model is as before afterwards.

    Args:
        model: Any module that runs eagerly.
        example_inputs: A tuple of positional arguments, a dict of keyword arguments, one tensor, a `Call`, or a list of
            several such calls.
        assume_unread: Names of modules (or parameters) that no call runs and that never will be.
        trial: Remove a part of each group from a copy in float64 and compare it with the masked model; what fails is
            not prunable. Without it, what the model's code does with its own integers goes unseen.
        axes: The neurons' axis in the output of layers of which their class does not tell it.

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
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise StructureError(
                f"The structure cannot be traced: {name or 'the model'} is sharded over processes. Change the whole "
                "model that it was made of: gather_sharded gives it weights and optimizer state, shard_anew spreads it."
            )
    trace, integers = _recorded(model, calls_of(example_inputs), axes)
    groups, frozen = find_groups(trace)
    unseen = unseen_in(trace)
    groups = refuse_unseen(model, groups, without(unseen, assume_unread))
    forecast = Forecast.of(trace, integers)
    precision = Precision()
    if trial:
        groups, precision = try_groups(model, trace.passes.recorded, groups, integers, forecast)
    share, read_points = coverage(model, groups), find_read_points(trace)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    modules = {o: sum(map(sizes.__getitem__, ns)) for o, ns in owners(model, unseen).items()}
    return Structure(
        groups,
        frozen,
        share,
        trace.operations,
        trace.flops,
        read_points,
        integers,
        forecast,
        trace.passes,
        unseen,
        modules,
        tuple(name for name in modules if not without([name], assume_unread)),
        precision,
        tuple(trace.failures),
    )


def _recorded(
    model: nn.Module, calls: Sequence[Call], axes: Mapping[str, int] | None
) -> tuple[Trace, Integers]:
    """The trace of the passes in which the model's integers are recorded, where the model bears it."""
    recorders: list[IntRecorder] = []

    def listen(trace: Trace, path: list[CallKey]) -> IntRecorder:
        recorders.append(IntRecorder(trace, path))
        return recorders[-1]

    try:
        runs, values = instrumented_copy(model)
        trace = record(model, calls, apply_rule, runs=runs, listen=listen, axes=axes)
    except Exception:  # a copy cannot be made, or the code wants plain integers
        trace = record(model, calls, apply_rule, axes=axes)
        return trace, Integers.of(trace, {}, [])
    equations = [equation for recorder in recorders for equation in recorder.equations.values()]
    couple(trace.labels, equations)
    return trace, Integers.of(trace, values, equations)


def _row(group: UnitGroup) -> str:
    readers = [t.rpartition(".")[0] or t for (t, _), r in group.roles.items() if r == "reads"]
    made, read = _some(group.layers), _some(list(dict.fromkeys(readers)))
    note = "" if group.prunable else f"  ({group.reason})"
    if group.inexact_reason:
        note += f"  ({group.inexact_reason})"
    exact = "yes" if group.exact else "no"
    return f"{group.name:<28} {group.kind:<10} {group.size:>6}  {exact:<6} {made} -> {read}{note}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "-") + more

"""Where a layer's neurons are read: the input of the module that consumes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from tracker.modules.kinds import kind_of, layer_of, stored_names
from tracker.modules.layers import find_layers
from tracker.structure.axes import Axis
from tracker.structure.trace import ModuleInput, Trace


@dataclass(frozen=True, slots=True)
class ReadPoint:
    """A module's first input, along whose `axis` a layer's neurons lie in order, each `positions` times.

    positions: More than 1 where a map of channels was flattened: (channels · positions).
    """

    module: str
    axis: int  # negative
    positions: int
    reader: str  # the module that multiplies; another one than `module` where a dropout stands before it


def find_read_points(trace: Trace) -> Mapping[str, ReadPoint]:
    """Layer → the place where its neurons are first read; layers of which the structure cannot tell are left out.

    A neuron is read where it is multiplied and added up with others: behind its nonlinearity, norm and pooling, and
    before a dropout. Of a sum of several layers (a residual stream) nobody reads one layer's own neurons.
    """
    times = Counter(call.module for call in trace.doors)
    readers = {layer_of(tensor) for tensor, _ in trace.reads}
    inputs = _Index(trace, [c for c in trace.doors if times[c.module] == 1 and c.module in readers])
    read_points = {}
    for layer in find_layers(trace.model):
        if layer.flattened > 1 or times[layer.name] > 1:
            continue
        shown = trace.outputs.axes.get(layer.name) if layer.neurons is None else None
        axis = shown[0] if shown else made_axis(trace, layer.name, layer.module)
        if axis is None:
            continue
        sets = trace.labels.sets(axis)
        if sets[:, 0].all() and trace.labels.summed.keys().isdisjoint(np.unique(sets).tolist()):
            read_point = inputs.find(layer.name, sets)
            if read_point is not None:
                read_points[layer.name] = read_point
    return read_points


class _Index:
    """Inputs of modules, found by the labels of their first index."""

    def __init__(self, trace: Trace, calls: list[ModuleInput]) -> None:
        self._trace = trace
        self._by_first: dict[bytes, list[tuple[ModuleInput, int, np.ndarray]]] = {}
        for call in calls:
            for d, axis in self._labelled(call):
                (first,) = trace.labels.sets(axis[:1])
                self._by_first.setdefault(first[first > 0].tobytes(), []).append((call, d, axis))

    def _labelled(self, call: ModuleInput) -> Iterator[tuple[int, np.ndarray]]:
        for d, axis in enumerate(call.axes or ()):
            if axis is not None:
                assert call.axes is not None
                yield d - len(call.axes), axis

    def find(self, layer: str, sets: np.ndarray) -> ReadPoint | None:
        """The first input in which these neurons lie, and only they."""
        labels = self._trace.labels
        for call, d, axis in self._by_first.get(sets[0][sets[0] > 0].tobytes(), ()):
            positions, rest = divmod(len(axis), len(sets))
            if rest or call.module == layer:
                continue
            if np.array_equal(labels.sets(axis), np.repeat(sets, positions, axis=0)):
                return ReadPoint(call.door or call.module, d, positions, call.module)
        return None


def made_axis(trace: Trace, name: str, module: nn.Module) -> Axis:
    """The axis of a layer's neurons; None where no tensor of its own shows them."""
    kind = kind_of(module)
    if kind is not None and kind.weight is None:
        return None
    weight, made = ("weight", 0) if kind is None else (kind.weight or "weight", kind.makes(module))
    bias = None if kind is None else kind.bias
    own = {bias or "bias": 0} | dict.fromkeys(stored_names(module, weight), made)
    for tensor, dim in own.items():
        axes = trace.parameters.get(f"{name}.{tensor}")
        axis: Axis = axes[dim] if axes and dim < len(axes) else None
        if axis is not None:
            return axis
    return None

"""Which tensors of a pass are weights, made of parameters alone, and from which of their dimensions they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tracker.layers import Layer, find_layers, width_of
from tracker.nested import first_floating, tensors_in
from tracker.structure.axes import Axis, Labels

if TYPE_CHECKING:
    from tracker.structure.trace import Op

Place = tuple[str, int]  # a tensor's key in the state dict, and a dimension
VIEW, COMPUTED, MULTIPLIED = range(3)
_PRODUCTS = {
    torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.mv,
    torch.ops.aten.addmv, torch.ops.aten.dot, torch.ops.aten.vdot, torch.ops.aten.convolution,
}  # fmt: skip


class Came(NamedTuple):
    """A dimension of a parameter or buffer, and how another tensor came by it.

    how: It is a view of it, was computed of it index by index, or is the outcome of a product.
    """

    tensor: str
    dim: int
    how: int = VIEW


Origin = frozenset[Came]  # of one dimension of a tensor
NOWHERE: Origin = frozenset()


@dataclass(slots=True)
class Weights:
    """Tensors that no input of the model has a part in.

    What a layer of a known kind is given and gives back is an activation, even where it comes from parameters alone (a
    learned query, say): its dimensions are the layer's neurons, and not those of a weight under way.
    """

    made: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    activations: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    origins: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    met: set[Place] = field(default_factory=set)  # dimensions of weights that activations meet
    folded: dict[Place, str] = field(default_factory=dict)  # that weights alone add up over

    def begin(self) -> None:
        """A pass begins: of the tensors of the one before nothing is left."""
        self.made, self.activations, self.origins = (WeakTensorKeyDictionary() for _ in range(3))

    def viewed(self, tensor: Tensor) -> list[list[Place]] | None:
        """The dimensions of parameters that a tensor is a view of; None where it is no view of them."""
        origin = self.origins.get(tensor)
        if origin is None or any(came.how != VIEW for each in origin for came in each):
            return None
        return [[(came.tensor, came.dim) for came in each] for each in origin]

    def origin(self, tensor: Tensor, name: str | None) -> list[Origin]:
        """Where each dimension comes from."""
        if name is not None:
            return [frozenset((Came(name, d),)) for d in range(tensor.ndim)]
        return self.origins.get(tensor) or [NOWHERE] * tensor.ndim

    def is_weight(self, tensor: Tensor, name: str | None) -> bool:
        """Whether no input has a part in it. A single number is no input."""
        if tensor in self.activations:
            return False
        return name is not None or tensor in self.made or tensor.numel() == 1

    def fold(self, origin: Origin, why: str) -> None:
        """Weights alone are added up over a dimension that came from there."""
        for came in origin:
            self.folded.setdefault((came.tensor, came.dim), why)

    def crossed(self, inputs: object) -> None:
        """These tensors pass the door of a layer."""
        for tensor in tensors_in(inputs):
            self.activations[tensor] = True
            if (origin := self.origins.pop(tensor, None)) is not None:
                views = [frozenset(c for c in o if c.how == VIEW) for o in origin]
                if any(views):
                    self.origins[tensor] = views

    def mark_inexact(self, labels: Labels, axes: dict[str, list[Axis]]) -> None:
        """Removal changes a weight of which activations read what is left, where weights alone add up over it."""
        for (name, dim), why in self.folded.items():
            if (name, dim) in self.met:
                labels.mark_inexact(axes[name][dim], why)


def inherited(
    labels: Labels, axes: list[Axis], inputs: Iterable[tuple[list[Axis], list[Origin]]], how: int
) -> list[Origin]:
    """Where the dimensions of a result come from: the inputs' dimensions that live and die with them."""
    every = [labels.every(axis) if axis is not None else frozenset() for axis in axes]
    found: list[set[Came]] = [set() for _ in axes]
    for theirs, origin in inputs:
        for axis, came in zip(theirs, origin, strict=True):
            if axis is None or not came:
                continue
            alike = labels.every(axis)
            for d, own in enumerate(every):
                if not own.isdisjoint(alike):
                    found[d] |= {Came(c.tensor, c.dim, max(c.how, how)) for c in came}
    return [frozenset(each) for each in found]


@dataclass(slots=True)
class Outputs:
    """Along which axis of a layer's output its neurons lie, as the pass showed it."""

    layers: dict[str, Layer]
    axes: dict[str, list[Axis]] = field(default_factory=dict)  # of each call

    @classmethod
    def of(cls, model: nn.Module, axes: Mapping[str, int] | None = None) -> Outputs:
        """Before any pass; `axes` names the neurons' axis of layers by hand."""
        return cls({layer.name: layer for layer in find_layers(model, axes)})

    def is_door(self, name: str) -> bool:
        """Whether what passes in and out there are activations: a layer of a known kind."""
        return name in self.layers and self.layers[name].neurons is not None

    def note(
        self, name: str, known: WeakTensorKeyDictionary, output: object, labels: Labels
    ) -> None:
        """A layer gave this back."""
        layer, tensor = self.layers[name], first_floating(output)
        axes = None if tensor is None else known.get(tensor)
        if tensor is None or axes is None:
            return
        if layer.flattened > 1:
            shape = list(tensor.shape[-layer.flattened :])
            self.axes.setdefault(name, []).append(labels.merge(shape, axes[-layer.flattened :]))
            return
        width = width_of(layer.module, tensor, layer.axis)
        if width is not None and -tensor.ndim <= width[1] < tensor.ndim:
            axis = axes[width[1]]
            if axis is not None and len(axis) == width[0]:
                self.axes.setdefault(name, []).append(axis)

    def neurons(self, labels: Labels) -> dict[int, set[tuple[str, int]]]:
        """Label → the neurons, (layer, local index), that die with it."""
        found: dict[int, set[tuple[str, int]]] = {}
        for name, calls in self.axes.items():
            for axis in calls:
                if axis is not None:
                    for label, index in _labelled(labels.sets(axis)):
                        found.setdefault(label, set()).add((name, index))
        return found


def _labelled(sets: np.ndarray) -> Iterator[tuple[int, int]]:
    for index, column in zip(*np.nonzero(sets), strict=True):
        yield int(sets[index, column]), int(index)


def is_random(func: torch._ops.OpOverload) -> bool:
    """Whether the operation draws what it gives, as an input would be."""
    return torch.Tag.nondeterministic_seeded in func.tags


def follow(op: Op) -> None:
    """Note whether the result is a weight, and where it comes from; or which weights activations met."""
    weights = op.trace.weights
    inputs = tensors_in((op.args, op.kwargs))
    results = [t for t in tensors_in(op.result) if op.trace.name(t) is None]
    came = [(t, origin) for t in inputs if any(origin := op.origin(t))]
    if not all(map(op.is_weight, inputs)) or (not inputs and is_random(op.func)):
        weights.met |= {(c.tensor, c.dim) for t, o in came if op.is_weight(t) for d in o for c in d}
        for tensor in results:
            weights.made.pop(tensor, None)
        return
    for tensor in results:
        weights.made[tensor] = True
        if came and tensor not in weights.origins and (axes := op.trace.known.get(tensor)):
            how = MULTIPLIED if op.func._overloadpacket in _PRODUCTS else COMPUTED
            known = [(op.axes(t), origin) for t, origin in came]
            weights.origins[tensor] = inherited(op.labels, axes, known, how)

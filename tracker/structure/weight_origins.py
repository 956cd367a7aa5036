"""Which tensors of a pass are weights, made of parameters alone, and from which of their dimensions they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tracker.modules.layers import Layer, find_layers, width_of
from tracker.structure.axes import Axis, Labels
from tracker.utils.nested import first_floating, tensors_in

if TYPE_CHECKING:
    from tracker.structure.trace import Op

Place = tuple[str, int]  # a tensor's key in the state dict, and a dimension
VIEW, COMPUTED, MULTIPLIED = range(3)
_PRODUCTS = {
    torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.mv,
    torch.ops.aten.addmv, torch.ops.aten.dot, torch.ops.aten.vdot, torch.ops.aten.convolution,
}  # fmt: skip
_SCALES = {torch.ops.aten.mul, torch.ops.aten.mul_, torch.ops.aten.div, torch.ops.aten.div_}
_CONSTANTS = {
    torch.ops.aten.ones_like, torch.ops.aten.full_like, torch.ops.aten.new_ones, torch.ops.aten.new_full,
}  # fmt: skip


class WeightOrigin(NamedTuple):
    """A dimension of a parameter or buffer, and how another tensor came by it.

    how: It is a view of it, was computed of it index by index, or is the outcome of a product.
    """

    tensor: str
    dim: int
    how: int = VIEW


Origin = frozenset[WeightOrigin]  # of one dimension of a tensor
NOWHERE: Origin = frozenset()


@dataclass(slots=True)
class Modulated:
    """Dimensions of weights that were multiplied with activations, index by index, before they were used."""

    folded: dict[Place, str] = field(default_factory=dict)  # added up over, by themselves
    read: set[Place] = field(default_factory=set)  # and that other activations read
    # By products with weights, each way: one reads a learned constant, of two one adds up beside it.
    with_weights: dict[Place, set[str]] = field(default_factory=dict)

    def fold(self, factors: Origin, why: str) -> None:
        """They are added up over a dimension that came from there."""
        for came in factors:
            self.folded.setdefault((came.tensor, came.dim), why)

    def inexact(self) -> Iterator[tuple[Place, str]]:
        """Dimensions of which what is left changes with a removal, and why."""
        for place, why in self.folded.items():
            if place in self.read or place in self.with_weights:
                yield place, why
        for place, ways in self.with_weights.items():
            if place in self.read or len(ways) > 1:
                yield place, min(ways)


@dataclass(slots=True)
class Weights:
    """Tensors that no input of the model has a part in, and modulated ones: weights times activations.

    A tensor that no operation gave and that is no input is a constant, registered or not.
    What a layer of a known kind is given and gives back is an activation, even where it comes from parameters alone (a
    learned query, say): its dimensions are the layer's neurons, and not those of a weight under way.
    """

    derived: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # of inputs
    activations: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    origins: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    met: set[Place] = field(default_factory=set)  # dimensions of weights that activations meet
    read_inside: set[Place] = field(default_factory=set)  # by products of weights alone
    folded: dict[Place, str] = field(default_factory=dict)  # that weights alone add up over
    factors: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # as origins
    modulated: Modulated = field(default_factory=Modulated)
    forms: dict[Place, dict[int, str]] = field(default_factory=dict)  # how it came to be read, why

    def begin(self, inputs: object = ()) -> None:
        """A pass begins: of the tensors of the one before nothing is left."""
        self.derived, self.activations = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.origins, self.factors = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for tensor in tensors_in(inputs):
            self.derived[tensor] = True

    def viewed(self, tensor: Tensor) -> list[list[Place]] | None:
        """The dimensions of parameters that a tensor is a view of; None where it is no view of them."""
        origin = self.origins.get(tensor)
        if origin is None or any(came.how != VIEW for each in origin for came in each):
            return None
        return [[(came.tensor, came.dim) for came in each] for each in origin]

    def origin(self, tensor: Tensor, name: str | None) -> list[Origin]:
        """Where each dimension comes from."""
        if name is not None:
            return [frozenset((WeightOrigin(name, d),)) for d in range(tensor.ndim)]
        return self.origins.get(tensor) or [NOWHERE] * tensor.ndim

    def is_weight(self, tensor: Tensor, name: str | None) -> bool:
        """Whether no input has a part in it. A single number is no input."""
        if tensor in self.activations:
            return False
        return name is not None or tensor not in self.derived or tensor.numel() == 1

    def fold(self, origin: Origin, why: str) -> None:
        """Weights alone are added up over a dimension that came from there."""
        for came in origin:
            self.folded.setdefault((came.tensor, came.dim), why)

    def read(
        self,
        x: Tensor,
        dim: int,
        other: Tensor,
        origin: Origin,
        weights: tuple[bool, bool],
        why: str,
    ) -> None:
        """A product adds up over a dimension of x: note what it tells of weights times activations.

        weights: Whether x is a weight, and whether the other is.
        """
        if weights == (True, False):
            for came in origin:
                self.forms.setdefault((came.tensor, came.dim), {}).setdefault(came.how, why)
        factors: Origin = self.factors[x][dim] if x in self.factors else NOWHERE
        theirs = NOWHERE.union(*self.factors.get(other, ()))
        if factors and weights[1]:
            for came in factors:
                self.modulated.with_weights.setdefault((came.tensor, came.dim), set()).add(why)
        elif factors & theirs:
            self.modulated.fold(factors, why)
        elif not weights[1]:
            self.modulated.read |= {(c.tensor, c.dim) for c in factors}

    def crossed(self, inputs: object) -> None:
        """These tensors pass the door of a layer."""
        for tensor in tensors_in(inputs):
            self.activations[tensor] = True
            if (origin := self.origins.pop(tensor, None)) is not None:
                views = [frozenset(c for c in o if c.how == VIEW) for o in origin]
                if any(views):
                    self.origins[tensor] = views

    def mark_inexact(self, labels: Labels, axes: dict[str, list[Axis]]) -> None:
        """Removal changes a weight of which activations read what is left, where anything else adds up over it."""
        folded = [(place, why) for place, why in self.folded.items() if place in self.met]
        folded += self.modulated.inexact()
        folded += [
            (place, ways[COMPUTED])
            for place, ways in self.forms.items()
            if VIEW in ways and COMPUTED in ways
        ]
        for (name, dim), why in folded:
            labels.mark_inexact(axes[name][dim], why)


def inherited(
    labels: Labels, axes: list[Axis], inputs: Iterable[tuple[list[Axis], list[Origin]]], how: int
) -> list[Origin]:
    """Where the dimensions of a result come from: the inputs' dimensions that live and die with them."""
    every = [labels.every(axis) if axis is not None else frozenset() for axis in axes]
    found: list[set[WeightOrigin]] = [set() for _ in axes]
    for theirs, origin in inputs:
        for axis, came in zip(theirs, origin, strict=True):
            if axis is None or not came:
                continue
            alike = labels.every(axis)
            for d, own in enumerate(every):
                if not own.isdisjoint(alike):
                    found[d] |= {WeightOrigin(c.tensor, c.dim, max(c.how, how)) for c in came}
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
    if op.func._overloadpacket in _CONSTANTS:
        return
    came = [(t, origin) for t in inputs if any(origin := op.origin(t))]
    if not all(map(op.is_weight, inputs)) or (not inputs and is_random(op.func)):
        weights.met |= {(c.tensor, c.dim) for t, o in came if op.is_weight(t) for d in o for c in d}
        _modulate(op, inputs, results)
        for tensor in results:
            weights.derived[tensor] = True
        return
    for tensor in results:
        if came and tensor not in weights.origins and (axes := op.trace.known.get(tensor)):
            how = MULTIPLIED if op.func._overloadpacket in _PRODUCTS else COMPUTED
            known = [(op.axes(t), origin) for t, origin in came]
            weights.origins[tensor] = inherited(op.labels, axes, known, how)


def _modulate(op: Op, inputs: list[Tensor], results: list[Tensor]) -> None:
    """Matrices times activations, index by index, and what is made of them up to the next product.

    A vector is no weight under way: it scales the activation.
    """
    weights, packet = op.trace.weights, op.func._overloadpacket
    if packet in _PRODUCTS:
        return
    factors = [(t, f) for t in inputs if (f := weights.factors.get(t))]
    if packet in _SCALES:
        factors += [
            (t, o) for t in inputs if op.is_weight(t) and sum(map(bool, o := op.origin(t))) > 1
        ]
    known = [(op.axes(t), f) for t, f in factors]
    for tensor in results if known else ():
        if axes := op.trace.known.get(tensor):
            weights.factors[tensor] = inherited(op.labels, axes, known, COMPUTED)

"""What a model was before its journal began: enough to lead it back there, and on by another journal. No weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import CheckpointError
from tracker.journal.replay import (
    fingerprint,
    load_architecture,
    meta_model_after,
    persistent_tensors,
    value_of,
    without_values,
)
from tracker.observation.neuron_ids import LayerIds
from tracker.structure.adapters.registry import adapt as adapt_module
from tracker.structure.code_sizes.attributes import sync_attributes, tensors
from tracker.structure.code_sizes.traced_int import Attribute, missing_attributes
from tracker.surgery.inserted_modules import Bypass, put_module
from tracker.surgery.undo import UndoLog

LOAD_FRESH = "Load it into a freshly built model."


class Change(Protocol):
    """What a change touches, by name: a plan, or an entry of a journal."""

    @property
    def touched(self) -> Iterable[str]:
        """Tensors."""

    @property
    def attributes(self) -> Mapping[Attribute, int]:
        """Integers of the model's code."""

    @property
    def modules(self) -> Mapping[str, object]:
        """What takes the place of others."""


@dataclass(slots=True)
class Origin:
    """Of all that changes touched, what was there first. It is only added to: later changes and `undo` leave it.

    Attributes:
        shapes: Of tensors.
        buffers: Contents of buffers that are in no state dict.
        modules: What stood under a name, without values; None: nothing.
        lost: Names of modules that cannot be put back, and why.
        integers: Of the model's code.
        ids: Of each layer's neurons.
        groups: Optimizer → the names of the parameters in each of its groups.
    """

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module | None] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    integers: dict[Attribute, int] = field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    groups: weakref.WeakKeyDictionary[Optimizer, list[list[str | None]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def note(
        self,
        model: nn.Module,
        change: Change,
        layers: Mapping[str, LayerIds],
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Know what a change is about to touch; called before it is made.

        Args:
            model: As it is before the change.
            change: What will be touched.
            layers: Ids of its neurons.
            optimizers: Of the model.
        """
        held, persistent = tensors(model), persistent_tensors(model)
        for name in held.keys() & {*change.touched}:
            self.shapes.setdefault(name, held[name].shape)
            if name not in persistent:
                self.buffers.setdefault(name, held[name].detach())
        for name in change.modules:
            if name not in self.modules:
                self._note_module(model, name, held, persistent)
        for attribute, value in _values(model, change.attributes).items():
            self.integers.setdefault(attribute, value)
        for name, layer in layers.items():
            if name not in self.ids:
                self.ids[name] = tuple(layer.ids)
        names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        for optimizer in optimizers if change.modules else ():
            if optimizer not in self.groups:
                groups = optimizer.param_groups
                self.groups[optimizer] = [[names.get(id(p)) for p in g["params"]] for g in groups]

    def note_all(
        self,
        model: nn.Module,
        changes: Iterable[Change],
        layers: Mapping[str, LayerIds],
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Know what several changes are about to touch, of which none was made yet.

        Args:
            model: As it is before the first of them.
            changes: What will be touched.
            layers: Ids of its neurons.
            optimizers: Of the model.
        """
        for change in changes:
            self.note(model, change, layers, optimizers)

    def _note_module(
        self,
        model: nn.Module,
        name: str,
        held: Mapping[str, Tensor],
        persistent: Mapping[str, Tensor],
    ) -> None:
        """What stands under a name that a change will give to something else."""
        try:
            module = model.get_submodule(name)
        except AttributeError:
            self.modules[name] = None
            return
        inside = {n: t for n, t in held.items() if n.startswith(f"{name}.")}
        own = {id(t) for t in inside.values()}
        if any(id(t) in own for n, t in held.items() if n not in inside):
            self.lost[name] = "shared tensors with other modules"
            return
        try:
            module = without_values(module)
        except Exception as error:  # the change itself needs no copy: only the way back is lost
            self.lost[name] = f"cannot be copied ({type(error).__name__}: {error})"
            return
        self.buffers.update(
            {
                n: t.detach()
                for n, t in inside.items()
                if n not in persistent and n not in self.buffers
            }
        )
        self.modules[name] = module

    def meta_model(self, model: nn.Module, before: str) -> nn.Module:
        """A copy of the model without values, as it was at first. The model is not touched.

        Args:
            model: As it is now.
            before: Fingerprint of the shapes that it had at first.

        Raises:
            CheckpointError: It is not known how the model was.
        """
        if self.lost:
            name, why = next(iter(self.lost.items()))
            raise CheckpointError(
                f"{name!r} was removed from the model and {why}: it cannot be put back. {LOAD_FRESH}"
            )
        meta_model = meta_model_after(model, ())
        for name in self._misplaced(meta_model):
            module = self.modules[name]
            put_module(
                meta_model, name, None if module is None else copy.deepcopy(module), UndoLog()
            )
        for name, tensor in tensors(meta_model).items():
            if self.shapes.get(name, tensor.shape) != tensor.shape:
                tensor.data = torch.empty(self.shapes[name], dtype=tensor.dtype, device="meta")
        sync_attributes(meta_model, self._integers_of(meta_model), lambda back: None)
        if fingerprint(meta_model) != before:
            raise CheckpointError(
                f"This model was changed, and how it was at first is not known. {LOAD_FRESH}"
            )
        return meta_model

    def restore(
        self, model: nn.Module, meta_model: nn.Module, log: UndoLog, optimizers: Sequence[Optimizer]
    ) -> None:
        """Give the model the architecture of its `meta_model`; what had other shapes has no values.

        Args:
            model: It is changed in place.
            meta_model: Its `meta_model`.
            log: How to take it back.
            optimizers: Parameters that come back join them, those of inserted layers leave.

        Raises:
            CheckpointError: An optimizer of which nobody knows where parameters belong that come back.
        """
        before = {id(p) for p in model.parameters()}
        held = tensors(meta_model)
        values = {n: t for n, t in self.buffers.items() if n in held and t.shape == held[n].shape}
        load_architecture(
            model, meta_model, values, self._misplaced(model), self._integers_of(meta_model), log
        )
        for optimizer in optimizers:
            self._regroup(optimizer, model, before, log)

    def _misplaced(self, model: nn.Module) -> Iterable[str]:
        """Names under which something else stands than at first, the outer ones first.

        One by one: what is put back under an outer name may bring what stood under the inner ones.
        """
        for name in sorted(self.modules, key=len):
            try:
                here = model.get_submodule(name)
            except AttributeError:
                continue
            first = self.modules[name]
            if first is None or (isinstance(here, Bypass) and not isinstance(first, Bypass)):
                yield name

    def _integers_of(self, model: nn.Module) -> dict[Attribute, int]:
        return {a: v for a, v in self.integers.items() if not missing_attributes(model, {a: 0})}

    def _regroup(
        self, optimizer: Optimizer, model: nn.Module, before: set[int], log: UndoLog
    ) -> None:
        """Have the groups of an optimizer as they were, without the states of parameters that are gone."""
        named = dict(model.named_parameters())
        now = {id(p) for p in named.values()}
        groups = optimizer.param_groups
        if before == now:
            return
        wanted = self._layout(optimizer, named, before)
        params = [list(group["params"]) for group in groups]
        states = dict(optimizer.state)

        def take_back() -> None:
            for group, part in zip(groups, params, strict=True):
                group["params"] = part
            optimizer.state.clear()
            optimizer.state.update(states)

        log.add(take_back)
        for group, own, part in zip(groups, wanted, params, strict=True):
            group["params"] = [*own, *(p for p in part if id(p) not in before | now)]
        for parameter in [p for p in optimizer.state if id(p) in before - now]:
            del optimizer.state[parameter]

    def _layout(
        self, optimizer: Optimizer, named: Mapping[str, nn.Parameter], before: set[int]
    ) -> list[list[nn.Parameter]]:
        """The model's parameters in each group of an optimizer, as they were at first."""
        groups = [group["params"] for group in optimizer.param_groups]
        if optimizer in self.groups:
            return [
                [named[n] for n in names if n is not None and n in named]
                for names in self.groups[optimizer]
            ]
        order = {id(p): place for place, p in enumerate(named.values())}
        stay = [[p for p in group if id(p) in order] for group in groups]
        back = [p for p in named.values() if id(p) not in before]
        if not back:
            return stay
        places = [order[id(p)] for p in stay[0]]
        if len(groups) > 1 or places != sorted(places):
            raise CheckpointError(
                f"Layers come back, and where their parameters belong in the groups of this {type(optimizer).__name__} "
                f"is not known. {LOAD_FRESH}"
            )
        return [sorted([*stay[0], *back], key=lambda p: order[id(p)])]


def _values(model: nn.Module, attributes: Iterable[Attribute]) -> dict[Attribute, int]:
    """The integers that a model's code has now, those of its adapted modules as they will be once adapted."""
    found: dict[Attribute, int] = {}
    adapted: nn.Module | None = None
    for attribute in attributes:
        if missing_attributes(model, {attribute: 0}):
            continue
        try:
            found[attribute] = value_of(model, attribute)
        except KeyError:
            if adapted is None:
                adapted = meta_model_after(model, ())
                for module in adapted.modules():
                    adapt_module(module)
            found[attribute] = value_of(adapted, attribute)
    return found

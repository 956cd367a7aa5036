"""Identity and observation: which neurons a model has, and what they do while data passes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracker.errors import NotTrackedError, StatisticsError, StructureError
from tracker.inputs.calls import ExampleInputs, calls_of
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.layers import find_layers, require_axes, unwrap
from tracker.modules.names import ByLayer, LayerOrName, names_in
from tracker.observation.compiled import forget_compiled_graphs
from tracker.observation.consumer_inputs import ConsumerInput, remapped
from tracker.observation.hooks import (
    ObservationPoint,
    Observer,
    attach,
    attach_points,
    detach_points,
    resolve_widths,
    watch_inputs,
)
from tracker.observation.neuron_ids import LayerIds, NeuronRegistry, layer_named
from tracker.observation.records import Observation
from tracker.observation.snapshot import first_mode, observed_layer
from tracker.structure import Passes, Structure, require_known, trace_structure
from tracker.utils.slotmap import SlotMap

log = logging.getLogger("tracker")
OBSERVE = ("reads", "output")
MODES = {"train": (True,), "eval": (False,), "all": (True, False)}
Undo = Callable[[Callable[[], None]], None]  # is told how to take a step back


@dataclass(slots=True, eq=False)
class TrackedModel:
    """A model that was handed to the tracker. The model itself is not kept alive."""

    name: str
    observer: Observer
    layers: dict[str, LayerIds] = field(default_factory=dict)  # in order of ids
    handles: list[RemovableHandle] = field(default_factory=list)
    hooked: bool = False  # its layers are
    structure: Structure | None = None  # as last traced
    reads: dict[str, ConsumerInput] = field(
        default_factory=dict
    )  # consumer's weight → what it was seen to read
    traced: bool = False  # the read points are set, or cannot be
    by_hand: frozenset[str] = frozenset()  # layers whose axis was named
    correlated: bool = False
    mode: str | None = None  # which mode to read; None: that of the first pass

    def model(self) -> nn.Module:
        """The model, if it still exists."""
        model = self.observer.model()
        if model is None:
            raise NotTrackedError(
                f"The model {self.name!r} no longer exists; its statistics can still be read. "
                "Keep a reference to the model, or track another one."
            )
        return model

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        detach_points(self.observer)
        self.handles, self.hooked = [], False
        self.observer.recording = False


class ActivationTracker:
    """Gives every neuron an id for life and streams its statistics. Several models may share one tracker."""

    def __init__(self, threshold: float, observe: str = "reads") -> None:
        if observe not in OBSERVE:
            raise StatisticsError(f"observe is one of {', '.join(OBSERVE)}, not {observe!r}.")
        if not threshold >= 0:
            raise StatisticsError(
                f"activation_threshold is a magnitude, 0 or larger, not {threshold!r}."
            )
        self.threshold, self.observe_at = threshold, observe
        self.registry = NeuronRegistry()
        self.models: list[TrackedModel] = []
        self._current: TrackedModel | None = None

    @property
    def current(self) -> TrackedModel:
        """The model that calls without a model speak of: the last one tracked or registered."""
        if self._current is None:
            raise NotTrackedError("No model is tracked yet. Call track_model(model) first.")
        return self._current

    @current.setter
    def current(self, entry: TrackedModel) -> None:
        self._current = entry

    def tracked(self, model: nn.Module) -> TrackedModel:
        """What is known of a model.

        Raises:
            NotTrackedError: Nothing.
        """
        entry = self._known(unwrap(model))
        if entry is None:
            raise NotTrackedError(
                f"This {type(model).__name__} is not tracked. Call track_model(model) before its hooks are registered."
            )
        return entry

    def living(self) -> list[TrackedModel]:
        """The tracked models that still exist."""
        return [entry for entry in self.models if entry.observer.model() is not None]

    def release(self) -> None:
        """Take the hooks off all models."""
        for entry in self.models:
            entry.detach()

    @contextmanager
    def speaking_of(self, entry: TrackedModel) -> Iterator[None]:
        """Inside, this model is the current one."""
        before, self._current = self._current, entry
        try:
            yield
        finally:
            self._current = before

    def track(
        self,
        model: nn.Module,
        name: str,
        example_inputs: ExampleInputs | None = None,
        axes: ByLayer[int] | None = None,
        batch_dim: int = 0,
        assume_unread: Collection[LayerOrName] = (),
    ) -> TrackedModel:
        """Give ids to the neurons of `model` and make it the current one; again for the same model: the same ids."""
        model = unwrap(model)
        known = self._known(model)
        if known is not None:
            if example_inputs is not None:
                self._show(known, model, example_inputs)
            self._current = known
            return known
        along: Mapping[str, int] = names_in(lambda: model, axes or {})
        unread: Collection[str] = names_in(lambda: model, assume_unread)
        points = [ObservationPoint(layer) for layer in find_layers(model, along)]
        if not points:
            raise NotTrackedError(
                f"{type(model).__name__} has no layer with neurons: no linear, convolutional, embedding, norm or "
                "recurrent layer, and no custom module with parameters of its own."
            )
        require_known(model, unread)
        require_axes(model, along, batch_dim)
        observer = Observer(weakref.ref(model), points, self.threshold, batch_dim)
        observer.unread = tuple(unread)
        entry = TrackedModel(name, observer, by_hand=frozenset(along))
        if example_inputs is not None:
            observer.given = calls_of(example_inputs)
            observer.inputs = observer.given[0].args, observer.given[0].kwargs
            resolve_widths(observer, model, observer.given)
        else:
            entry.handles = [watch_inputs(observer, model)]
        for point in points:
            if point.neurons is not None:
                self.register_layer(entry, point)
        # Weak: the model's hooks lead to the observer, and must not keep the whole tracker alive.
        this = weakref.ref(self)

        def resolved(point: ObservationPoint) -> None:
            if (tracker := this()) is not None:
                tracker.register_layer(entry, point)

        def shown() -> None:
            if (tracker := this()) is not None:
                tracker.set_read_points(entry)

        observer.resolved, observer.shown = resolved, shown
        self.models.append(entry)
        self._current = entry
        return entry

    def _show(self, entry: TrackedModel, model: nn.Module, example_inputs: ExampleInputs) -> None:
        """Take other example inputs for a model that is tracked: its structure is traced anew."""
        observer = entry.observer
        with observer.paused():
            calls = calls_of(example_inputs)
            for call in calls:
                forward_once(model, call, watch_writes=True)
        observer.given, observer.inputs = calls, (calls[0].args, calls[0].kwargs)
        entry.structure, entry.traced = None, False
        self.set_read_points(entry)

    def hook(self, model: nn.Module | None = None) -> None:
        """Put hooks on a tracked model (the current one), and make it the current one."""
        entry = self.current if model is None else self.tracked(model)
        entry.detach()
        entry.handles, entry.hooked = attach(entry.observer, entry.model()), True
        self._current = entry
        forget_compiled_graphs()

    def start(
        self,
        correlate: bool = False,
        mode: str | None = None,
        every: int = 1,
        layers: LayerOrName | Collection[LayerOrName] | None = None,
        sampling: int = 1,
    ) -> None:
        """Begin a fresh window of statistics on the current model."""
        if mode is not None and mode not in MODES:
            raise StatisticsError(f"mode is one of {', '.join(MODES)} or None, not {mode!r}.")
        if every < 1:
            raise StatisticsError(f"every is a number of passes, 1 or more, not {every!r}.")
        if sampling < 1:
            raise StatisticsError(
                f"correlation_every is a number of rows, 1 or more, not {sampling!r}."
            )
        entry = self.current
        observer = entry.observer
        names = [point.name for point in observer.points]
        wanted = names_in(entry.model, [layers] if isinstance(layers, LayerOrName) else layers)
        chosen = None if layers is None else frozenset(layer_named(names, n) for n in wanted)
        changed, observer.chosen = chosen != observer.chosen, chosen
        if not entry.hooked or observer.model() is None or changed:
            self.hook()
        self.set_read_points(entry)
        observer.clear()
        observer.correlate = entry.correlated = correlate
        observer.every, observer.sampling, entry.mode = every, sampling, mode
        observer.recording = True

    def stop(self) -> None:
        """Record no more; what was seen stays readable."""
        self.current.observer.recording = False

    def structure(self) -> Structure:
        """The structure of the current model, traced when first asked."""
        entry = self.current
        model, observer = entry.model(), entry.observer
        if entry.structure is None:
            if observer.inputs is None:
                raise StructureError(
                    f"The structure of {entry.name!r} cannot be traced without data. Run the model once, or pass "
                    "example_inputs to track_model."
                )
            with observer.paused(), torch.inference_mode(False):
                entry.structure = trace_structure(
                    model, [*observer.calls], assume_unread=observer.unread, axes=observer.axes
                )
        ids = {
            (name, index): neuron
            for name, layer in entry.layers.items()
            for index, neuron in enumerate(layer.ids)
        }
        return entry.structure.with_ids(ids)

    def passes(self) -> Passes:
        """The calls of the current model that can be made, each in its mode."""
        entry = self.current
        if entry.structure is not None:
            return entry.structure.passes
        found, model = Passes(), copy_without_hooks(entry.model())
        for made in (made for call in entry.observer.calls for made in call.modes()):
            try:
                forward_once(model, made, watch_writes=True)
            except StructureError as error:  # noqa: PERF203
                found.failed.append((made, str(error)))
            else:
                found.recorded.append(made)
        if not found.recorded:
            raise StructureError(
                found.failed[0][1] if found.failed else "There is no example call."
            )
        return found

    def remap(
        self,
        layers: Mapping[str, SlotMap],
        tensors: Mapping[str, Mapping[int, SlotMap]],
        why: str,
        undo: Undo = lambda back: None,
        ids: Iterator[int] | None = None,
    ) -> list[int]:
        """Move ids and statistics of the current model's layers, and what its consumers were seen to read.

        `undo` is told how to take it all back, before anything is written. `ids`: for new neurons that had
        some at another time.

        Returns:
            The ids of new neurons.
        """
        entry = self.current
        there = dict(entry.model().named_parameters(remove_duplicate=False))
        reads = remapped({n: r for n, r in entry.reads.items() if n in there}, tensors)
        points = {point.name: point for point in entry.observer.points}
        moved = {name: points[name].remapped(slots) for name, slots in layers.items()}
        before = {name: (points[name].neurons, points[name].windows) for name in layers}
        old_ids = {name: list(entry.layers[name].ids) for name in layers}
        old_reads, old_structure = entry.reads, entry.structure

        def back() -> None:
            entry.reads, entry.structure = old_reads, old_structure
            for name in layers:
                points[name].neurons, points[name].windows = before[name]
                self.registry.restore(entry.layers[name], old_ids[name])
            entry.observer.version += 1

        undo(back)
        entry.reads, entry.structure = reads, None
        added: list[int] = []
        for name, slots in layers.items():
            points[name].neurons, points[name].windows = slots.size, moved[name]
            added += self.registry.remap(entry.layers[name], slots, why, ids)
        entry.observer.version += 1
        return sorted(added)

    def sync_layers(
        self,
        why: str,
        undo: Undo = lambda back: None,
        ids_of: Callable[[str, int], Sequence[int] | None] = lambda layer, neurons: None,
    ) -> tuple[list[int], list[int]]:
        """Layers of the current model came and went: give ids to the new ones, retire those of the others.

        `undo` is told how to take it all back, before anything is written. `ids_of`: ids for a layer of so many
        neurons, which had some at another time.

        Returns:
            The new ids, and those that left.
        """
        entry = self.current
        observer, model = entry.observer, entry.model()
        old_sites, old_layers = list(observer.points), dict(entry.layers)
        observed = [(s, s.read_point, s.shares_with, s.windows) for s in old_sites]
        known = {point.name: point for point in observer.points}
        axes = {name: known[name].axis for name in entry.by_hand if name in known}
        named = {name: axis for name, axis in axes.items() if axis is not None}
        layers = {layer.name: layer for layer in find_layers(model, named)}
        gone = [name for name in known if name not in layers]
        born = [layers[name] for name in layers if name not in known]
        removed = [i for name in gone if name in entry.layers for i in entry.layers[name].ids]
        before = {name: list(entry.layers[name].ids) for name in gone if name in entry.layers}

        def back() -> None:
            for name, ids in before.items():
                self.registry.restore(old_layers[name], ids)
            observer.points[:] = old_sites
            for point, place, same, seen in observed:
                point.read_point, point.shares_with, point.windows = place, same, seen
            for layer in born:
                entry.layers.pop(layer.name, None)
            entry.layers.update(old_layers)
            entry.structure, entry.traced = old_structure, old_traced
            observer.version += 1

        old_structure, old_traced = entry.structure, entry.traced
        undo(back)
        for name in before:
            self.registry.remap(entry.layers.pop(name), SlotMap(()), why)
        order = list(layers)
        points = [*(s for s in old_sites if s.name not in gone), *map(ObservationPoint, born)]
        observer.points[:] = sorted(points, key=lambda point: order.index(point.name))
        added: list[int] = []
        for point in (p for p in observer.points if p.name not in known):
            if point.neurons is not None:
                self.register_layer(entry, point, ids_of(point.name, point.neurons))
                added += entry.layers[point.name].ids
        entry.structure, entry.traced = None, False
        if entry.hooked:
            attach_points(observer, model)
            self.set_read_points(entry)
        observer.version += 1
        return added, removed

    def rehook(self) -> Callable[[], None]:
        """Puts hooks where the current model is observed: after an undo of `sync_layers`, when all modules are back."""
        entry = self.current

        def back() -> None:
            model = entry.observer.model()
            if entry.hooked and model is not None:
                attach_points(entry.observer, model)

        return back

    @contextmanager
    def masking(self, mask: Tensor) -> Iterator[None]:
        """Leave padding out of all that is observed inside. mask: (batch, positions), True where a token is real."""
        observer = self.current.observer
        before, observer.padding = observer.padding, mask.bool()
        try:
            yield
        finally:
            observer.padding = before

    def observe(self, mode: str | None = None) -> Observation:
        """What the current window shows so far, frozen. `mode`: "train", "eval", "all", or None for the window's."""
        entry = self.current
        observer = entry.observer
        mode = mode or entry.mode or first_mode(observer)
        if mode not in MODES:
            raise StatisticsError(f"mode is one of {', '.join(MODES)}, not {mode!r}.")
        flags = MODES[mode]
        points = {point.name: point for point in observer.points}
        layers = tuple(
            observed_layer(ids, points[name], flags, observer.fallback)
            for name, ids in entry.layers.items()
        )
        samples = sum(observer.samples.get(flag, 0) for flag in flags)
        # Without a pass through the model's own door, a layer's batch is all that is known.
        samples = samples or max((int(la.activity.observations.max()) for la in layers), default=0)
        others = sum(n for flag, n in observer.samples.items() if flag not in flags)
        return Observation(entry.name, layers, samples, mode, others, self.threshold)

    def set_read_points(self, entry: TrackedModel) -> None:
        """Observe layers where they are read; where that cannot be told, at their own outputs."""
        observer, model = entry.observer, entry.observer.model()
        wanted = self.observe_at == "reads" and entry.hooked and not entry.traced
        if not wanted or observer.inputs is None or model is None:
            return
        entry.traced = True
        try:
            with observer.paused(), torch.inference_mode(False):
                quiet = copy_without_hooks(model)
                call, axes = observer.calls[0].modes()[0], observer.axes
                read_points = trace_structure(quiet, call, trial=False, axes=axes).read_points
        except Exception as error:  # a model that cannot be copied or traced can still be observed
            observer.fallback = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"
            log.warning(
                "Layers of %r are observed at their own outputs, before their nonlinearities: where they are read "
                "cannot be told (%s)", entry.name, observer.fallback, exc_info=error,
            )  # fmt: skip
            return
        observer.fallback = ""
        for point in observer.points:
            read_point = read_points.get(point.name)
            if point.name not in entry.by_hand and read_point != point.read_point:
                point.read_point, point.shares_with = read_point, None
                point.windows = {}  # no window mixes two places
        attach_points(observer, model)

    def _known(self, model: nn.Module) -> TrackedModel | None:
        return next((m for m in self.models if m.observer.model() is model), None)

    def register_layer(
        self, entry: TrackedModel, point: ObservationPoint, known: Sequence[int] | None = None
    ) -> None:
        """Give ids to the neurons of a layer whose width is known: new ones, or those of another time."""
        assert point.neurons is not None
        ids = self.registry.register(entry.name, point.name, point.neurons, known)
        entry.layers[point.name] = ids

"""Where an activation is taken: hooks that reduce a tensor at once and keep no reference to it.

A neuron is observed where it is read: at the door of the module that consumes it, behind its nonlinearity. Where
structure cannot tell, or when asked for, it is observed at its own layer's output.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import forward_once
from tracker.modules.layers import Layer, width_of
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.statistics import ActivityStream, CovarianceStream, Scratch
from tracker.structure import ReadPoint
from tracker.utils.nested import first_floating, replaced, tensors_in
from tracker.utils.slotmap import SlotMap

# Wider layers are not correlated: neurons² numbers of 12 bytes are 3 GB here.
MAX_CORRELATED = 16384
NOTED = 8  # passes of a window that all show which outputs the model returns


@dataclass(slots=True)
class LayerStatistics:
    """What one layer showed since tracking began, in one mode."""

    activity: ActivityStream
    covariance: CovarianceStream | None


class ObservationPoint:
    """One layer's place of observation, and what was seen there."""

    def __init__(self, layer: Layer) -> None:
        self.name, self.kind = layer.name, layer.kind
        self.neurons, self.axis, self.flattened = layer.neurons, layer.axis, layer.flattened
        self.read_point: ReadPoint | None = None  # where it is observed; None: at its own output
        # Another site with the same tap: what it sees, this one sees.
        self.shares_with: ObservationPoint | None = None
        self.seen: dict[bool, LayerStatistics] = {}
        self.problem = ""  # why nothing, or no more, is observed
        self.stopped = False
        # Of the pass under way, to see what the model returns.
        self.output: weakref.ref[Tensor] | None = None
        self.is_output = False

    @property
    def windows(self) -> dict[bool, LayerStatistics]:
        """What was seen, by the model's training flag."""
        return (self.shares_with or self).seen

    @windows.setter
    def windows(self, windows: dict[bool, LayerStatistics]) -> None:
        (self.shares_with or self).seen = windows

    def remapped(self, slots: SlotMap) -> dict[bool, LayerStatistics]:
        """The windows after the layer's neurons were removed, added or reordered."""
        return {
            flag: LayerStatistics(
                window.activity.remap(slots),
                None if window.covariance is None else window.covariance.remap(slots),
            )
            for flag, window in self.windows.items()
        }


@dataclass(eq=False)
class Observer:
    """All the places of observation of one model, and the switch."""

    model: weakref.ref[nn.Module]
    points: list[ObservationPoint]
    threshold: float
    batch_dim: int = 0
    # Told when a custom layer's first output shows its width.
    resolved: Callable[[ObservationPoint], None] = lambda point: None
    # Told when the first pass shows example inputs.
    shown: Callable[[], None] = lambda: None
    handles: list[RemovableHandle] = field(default_factory=list)  # of the sites' hooks
    recording: bool = False
    correlate: bool = False
    every: int = 1  # of so many passes of a mode one is observed, the first one first
    sampling: int = 1  # of so many rows of a pass one goes into the covariance
    chosen: frozenset[str] | None = None  # layers that are observed; None: all
    passes: dict[bool, int] = field(default_factory=dict)
    # Of the first pass, or of the first call that was given.
    inputs: tuple[tuple[object, ...], dict[str, object]] | None = None
    given: tuple[Call, ...] = ()  # as example inputs
    unread: tuple[str, ...] = ()  # modules of which the user says that nothing runs them
    padding: Tensor | None = None  # (batch, positions), True where a token is real
    samples: dict[bool, int] = field(default_factory=dict)
    version: int = 0  # grows with every change of the statistics
    training: bool | None = None  # mode of the pass under way
    fallback: str = ""  # why all layers are observed at their own outputs
    noting: bool = True  # whether this pass shows which layers' outputs the model returns
    scratch: Scratch = field(default_factory=Scratch)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Examples of how the model is called: those that were given, or the first pass."""
        return self.given or (() if self.inputs is None else (Call.of(*self.inputs),))

    @property
    def axes(self) -> dict[str, int]:
        """Along which axis of its output each layer's neurons lie, where that is known."""
        return {point.name: point.axis for point in self.points if point.axis is not None}

    def copied(self, model: nn.Module) -> Observer:
        """The same of a copy of the model, of which nothing is observed."""
        points = {id(point): copy.copy(point) for point in self.points}
        for point in points.values():
            point.shares_with = None if point.shares_with is None else points[id(point.shares_with)]
        nothing = Observer(
            weakref.ref(model), list(points.values()), self.threshold, self.batch_dim
        )
        nothing.inputs, nothing.given, nothing.unread = self.inputs, self.given, self.unread
        nothing.version = self.version
        return nothing

    def clear(self) -> None:
        """Begin a fresh window."""
        self.samples, self.passes = {}, {}
        self.training, self.noting = None, True
        self.version += 1
        for point in self.points:
            point.windows = {}
            point.stopped = False
            point.problem = "" if self.watches(point) else "not chosen for this window"

    def watches(self, point: ObservationPoint) -> bool:
        """Whether the layer is one of those that are observed."""
        return self.chosen is None or point.name in self.chosen

    def is_due(self) -> bool:
        """Whether the pass under way is one of those that are observed."""
        training = self.model_is_training() if self.training is None else self.training
        return self.passes.get(training, 0) % self.every == 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What passes inside is not observed."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording

    def take(self, point: ObservationPoint, output: Tensor, training: bool) -> None:
        """Fold one layer output into the statistics. Never raises: a user's training goes on without us."""
        if point.stopped:
            return
        try:
            with self.lock:
                self._take(point, output, training if self.training is None else self.training)
        except Exception as error:
            point.stopped = True
            point.problem = f"observation stopped: {type(error).__name__}: {error}"
            warnings.warn(f"Layer {point.name!r}: {point.problem}", RuntimeWarning, stacklevel=2)

    def _take(self, point: ObservationPoint, output: Tensor, training: bool) -> None:
        if output.is_meta:
            point.problem = f"its output is {output.dtype} on {output.device.type}"
            return
        if point.neurons is None and not self._resolve(point, output):
            return
        placed = self._placed(point, output)
        if placed is None:
            shape = tuple(output.shape)
            point.problem = f"its output {shape} has no axis of {point.neurons} at {point.axis}"
            return
        self.version += 1
        seen = (point.shares_with or point).seen
        window = seen.get(training) or self._open_window(point, training, output.device)
        output, axis = placed
        if window.covariance is None:
            window.activity.add(output, axis, self.scratch)
        else:
            mean = window.activity.add(output, axis, self.scratch, mean=True)
            if self.sampling == 1:
                window.covariance.add(output, mean, axis)
            else:
                turn = self.passes.get(training, 0) // self.every
                window.covariance.add_some(output, axis, self.sampling, turn, mean)

    def _open_window(
        self, point: ObservationPoint, training: bool, device: torch.device
    ) -> LayerStatistics:
        neurons: int = point.neurons  # type: ignore[assignment]
        correlate = self.correlate and neurons <= MAX_CORRELATED
        covariance = CovarianceStream(neurons, device) if correlate else None
        activity = ActivityStream(neurons, self.threshold, device)
        window = point.windows[training] = LayerStatistics(activity, covariance)
        return window

    def _resolve(self, point: ObservationPoint, output: Tensor) -> bool:
        model = self.model()
        module = model.get_submodule(point.name) if model is not None else None
        width = width_of(module, output, point.axis) if module is not None else None
        if width is None:
            shape = tuple(output.shape)
            point.problem = f"no axis of its output {shape} is one of its parameters' sizes"
            return False
        point.neurons, point.axis = width
        self.resolved(point)
        return True

    def _placed(self, point: ObservationPoint, output: Tensor) -> tuple[Tensor, int] | None:
        """The real (not padded) part of an output, and the neurons' axis in it."""
        axis: int = point.axis  # type: ignore[assignment]
        if point.read_point is not None:
            axis, positions = point.read_point.axis, point.read_point.positions
            if positions > 1 and output.shape[axis] == (point.neurons or 0) * positions:
                output = output.unflatten(axis, (-1, positions))
                axis -= axis < 0
        elif point.flattened > 1:
            output = output.flatten(-point.flattened)
        if not -output.ndim <= axis < output.ndim or output.shape[axis] != point.neurons:
            return None
        axis %= output.ndim
        mask = self.padding
        if mask is not None and mask.ndim <= axis and output.shape[: mask.ndim] == mask.shape:
            output, axis = output.detach()[mask.to(output.device)], axis - mask.ndim + 1
        return output, axis

    def model_is_training(self) -> bool:
        """The model's own mode, now."""
        model = self.model()
        return model is not None and model.training

    def end_pass(self, first: Tensor | None, output: object) -> None:
        """The model's own forward is done; one that raised never gets here. `first`: its first input tensor."""
        training, due, number = bool(self.training), self.is_due(), sum(self.passes.values()) + 1
        self.passes[training] = self.passes.get(training, 0) + 1
        self.training = None
        if not due:
            return
        count = 1
        if first is not None and first.ndim > max(1, self.batch_dim):
            count = first.shape[self.batch_dim]
        self.samples[training] = self.samples.get(training, 0) + count
        self.version += 1
        if self.noting:
            returned = {id(t) for t in tensors_in(output)}
            for point in self.points:
                tensor = point.output() if point.output is not None else None
                point.is_output = point.is_output or (tensor is not None and id(tensor) in returned)
                point.output = None
        # A model seldom changes its mind about what it returns: the first passes tell, then each power of two.
        self.noting = number < NOTED or number & (number - 1) == 0


class Hook(GraphHook):
    """A hook of an observer, which it does not keep alive."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = weakref.ref(observer)

    def active_observer(self) -> Observer | None:
        """The observer, if it lives, records, and this pass is new data."""
        observer = self._observer()
        return observer if observer and observer.recording and is_new_data() else None

    def observer_if_due(self) -> Observer | None:
        """The same, if it is the turn of this pass. Asked by each layer in each pass."""
        observer = self._observer()
        if observer is None or not observer.recording or not is_new_data():
            return None
        return observer if observer.every == 1 or observer.is_due() else None


class LayerHook(Hook):
    """Observes one layer."""

    def __init__(self, observer: Observer, point: ObservationPoint) -> None:
        super().__init__(observer)
        self._site = point

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Forward hook of the layer."""
        if torch.compiler.is_compiling():
            self.in_graph(first_floating(output))
        elif (observer := self.observer_if_due()) is not None and (
            tensor := first_floating(output)
        ) is not None:
            if observer.noting and not self._site.is_output:
                self._site.output = weakref.ref(tensor)
            observer.take(self._site, tensor, module.training)

    def seen(self, tensor: Tensor) -> None:
        """Inside a compiled graph the mode is the model's at run time."""
        if (observer := self.observer_if_due()) is not None:
            observer.take(self._site, tensor, observer.model_is_training())


class ReadHook(LayerHook):
    """Observes one layer at the door of the module that reads it."""

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: object) -> None:
        """Forward pre-hook of the reading module."""
        if torch.compiler.is_compiling():
            self.in_graph(first_floating((args, kwargs)))
        elif (observer := self.observer_if_due()) is not None:
            first = first_floating(args[0]) if args else None
            tensor = first_floating((args, kwargs)) if first is None else first
            if tensor is not None:
                observer.take(self._site, tensor, module.training)


class EnterHook(Hook):
    """Stands at the model's door: tells in which mode a pass begins, and keeps the first inputs as an example."""

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_compiling() or not is_new_data():
            return
        observer = self._observer()
        if observer is not None and observer.inputs is None:
            observer.inputs = _without_graph(args), _without_graph(kwargs)
            observer.shown()
        if observer is not None and observer.recording:
            observer.training = module.training


class LeaveHook(Hook):
    """Stands at the model's door: counts the samples of a pass that came to its end."""

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: object, output: object
    ) -> None:
        """Forward hook of the model."""
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next(iter(tensors_in((args, kwargs))), None)
        if torch.compiler.is_compiling():
            self.in_graph(first)
        elif (observer := self.active_observer()) is not None:
            observer.end_pass(first, output)

    def seen(self, tensor: Tensor) -> None:
        """What the model returned is not known here."""
        if (observer := self.active_observer()) is not None:
            observer.training = observer.model_is_training()
            observer.end_pass(tensor, ())


def _without_graph(value: Any) -> Any:
    """The same example, which keeps nothing alive of what made it."""
    if all(tensor.grad_fn is None for tensor in tensors_in(value)):
        return value
    return replaced(value, Tensor.detach)


def resolve_widths(observer: Observer, model: nn.Module, calls: Iterable[Call]) -> None:
    """Make calls for layers to show how many neurons they have; nothing of them is counted."""
    handles = attach(observer, model)
    observer.recording = True
    try:
        for call in calls:
            forward_once(model, call, heard=True, watch_writes=True)
    finally:
        for handle in handles:
            handle.remove()
        detach_points(observer)
        observer.recording = False
        observer.clear()


def attach(observer: Observer, model: nn.Module) -> list[RemovableHandle]:
    """Put the hooks on the model's door and on its layers; the handles take those of the door off again."""
    attach_points(observer, model)
    return [
        watch_inputs(observer, model),
        model.register_forward_hook(LeaveHook(observer), with_kwargs=True),
    ]


def attach_points(observer: Observer, model: nn.Module) -> None:
    """Put the hooks where the layers are observed now, and nowhere else."""
    detach_points(observer)
    leaders: dict[tuple[ReadPoint, int | None], ObservationPoint] = {}
    modules = dict(model.named_modules())
    for point in observer.points:
        point.shares_with = None
        if (
            point.read_point is not None and point.read_point.module not in modules
        ):  # it was removed
            point.read_point, point.windows = None, {}
        if not observer.watches(point):
            continue
        if point.read_point is None:
            module = model.get_submodule(point.name)
            # The layer's own output, whatever other hooks make of it.
            handle = module.register_forward_hook(LayerHook(observer, point), prepend=True)
        else:
            shares_with = leaders.setdefault((point.read_point, point.neurons), point)
            if shares_with is not point:
                point.shares_with = shares_with
                continue
            module = model.get_submodule(point.read_point.module)
            handle = module.register_forward_pre_hook(ReadHook(observer, point), with_kwargs=True)
        observer.handles.append(handle)


def detach_points(observer: Observer) -> None:
    """Take the layers' hooks off."""
    while observer.handles:
        observer.handles.pop().remove()


def watch_inputs(observer: Observer, model: nn.Module) -> RemovableHandle:
    """Have the first forward pass supply the example inputs that tracing needs."""
    return model.register_forward_pre_hook(EnterHook(observer), with_kwargs=True)

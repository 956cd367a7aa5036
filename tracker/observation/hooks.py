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
from tracker.structure import Tap
from tracker.utils.nested import first_floating, replaced, tensors_in
from tracker.utils.slotmap import SlotMap

# Wider layers are not correlated: neurons² numbers of 12 bytes are 3 GB here.
MAX_CORRELATED = 16384
NOTED = 8  # passes of a window that all show which outputs the model returns


@dataclass(slots=True)
class Window:
    """What one layer showed since tracking began, in one mode."""

    activity: ActivityStream
    covariance: CovarianceStream | None


class Site:
    """One layer's place of observation, and what was seen there."""

    def __init__(self, layer: Layer) -> None:
        self.name, self.kind = layer.name, layer.kind
        self.neurons, self.axis, self.flattened = layer.neurons, layer.axis, layer.flattened
        self.tap: Tap | None = None  # where it is observed; None: at its own output
        # Another site with the same tap: what it sees, this one sees.
        self.leader: Site | None = None
        self.seen: dict[bool, Window] = {}
        self.problem = ""  # why nothing, or no more, is observed
        self.stopped = False
        # Of the pass under way, to see what the model returns.
        self.output: weakref.ref[Tensor] | None = None
        self.is_output = False

    @property
    def windows(self) -> dict[bool, Window]:
        """What was seen, by the model's training flag."""
        return (self.leader or self).seen

    @windows.setter
    def windows(self, windows: dict[bool, Window]) -> None:
        (self.leader or self).seen = windows

    def reslotted(self, slots: SlotMap) -> dict[bool, Window]:
        """The windows after the layer's neurons were removed, added or reordered."""
        return {
            flag: Window(
                window.activity.reslot(slots),
                None if window.covariance is None else window.covariance.reslot(slots),
            )
            for flag, window in self.windows.items()
        }


@dataclass(eq=False)
class Observer:
    """All the places of observation of one model, and the switch."""

    model: weakref.ref[nn.Module]
    sites: list[Site]
    threshold: float
    batch_dim: int = 0
    # Told when a custom layer's first output shows its width.
    resolved: Callable[[Site], None] = lambda site: None
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
        return {site.name: site.axis for site in self.sites if site.axis is not None}

    def copied(self, model: nn.Module) -> Observer:
        """The same of a copy of the model, of which nothing is observed."""
        sites = {id(site): copy.copy(site) for site in self.sites}
        for site in sites.values():
            site.leader = None if site.leader is None else sites[id(site.leader)]
        nothing = Observer(weakref.ref(model), list(sites.values()), self.threshold, self.batch_dim)
        nothing.inputs, nothing.given, nothing.unread = self.inputs, self.given, self.unread
        nothing.version = self.version
        return nothing

    def clear(self) -> None:
        """Begin a fresh window."""
        self.samples, self.passes = {}, {}
        self.training, self.noting = None, True
        self.version += 1
        for site in self.sites:
            site.windows = {}
            site.stopped = False
            site.problem = "" if self.watches(site) else "not chosen for this window"

    def watches(self, site: Site) -> bool:
        """Whether the layer is one of those that are observed."""
        return self.chosen is None or site.name in self.chosen

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

    def take(self, site: Site, output: Tensor, training: bool) -> None:
        """Fold one layer output into the statistics. Never raises: a user's training goes on without us."""
        if site.stopped:
            return
        try:
            with self.lock:
                self._take(site, output, training if self.training is None else self.training)
        except Exception as error:
            site.stopped = True
            site.problem = f"observation stopped: {type(error).__name__}: {error}"
            warnings.warn(f"Layer {site.name!r}: {site.problem}", RuntimeWarning, stacklevel=2)

    def _take(self, site: Site, output: Tensor, training: bool) -> None:
        if output.is_meta:
            site.problem = f"its output is {output.dtype} on {output.device.type}"
            return
        if site.neurons is None and not self._resolve(site, output):
            return
        placed = self._placed(site, output)
        if placed is None:
            shape = tuple(output.shape)
            site.problem = f"its output {shape} has no axis of {site.neurons} at {site.axis}"
            return
        self.version += 1
        seen = (site.leader or site).seen
        window = seen.get(training) or self._open_window(site, training, output.device)
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

    def _open_window(self, site: Site, training: bool, device: torch.device) -> Window:
        neurons: int = site.neurons  # type: ignore[assignment]
        correlate = self.correlate and neurons <= MAX_CORRELATED
        covariance = CovarianceStream(neurons, device) if correlate else None
        activity = ActivityStream(neurons, self.threshold, device)
        window = site.windows[training] = Window(activity, covariance)
        return window

    def _resolve(self, site: Site, output: Tensor) -> bool:
        model = self.model()
        module = model.get_submodule(site.name) if model is not None else None
        width = width_of(module, output, site.axis) if module is not None else None
        if width is None:
            shape = tuple(output.shape)
            site.problem = f"no axis of its output {shape} is one of its parameters' sizes"
            return False
        site.neurons, site.axis = width
        self.resolved(site)
        return True

    def _placed(self, site: Site, output: Tensor) -> tuple[Tensor, int] | None:
        """The real (not padded) part of an output, and the neurons' axis in it."""
        axis: int = site.axis  # type: ignore[assignment]
        if site.tap is not None:
            axis, positions = site.tap.axis, site.tap.positions
            if positions > 1 and output.shape[axis] == (site.neurons or 0) * positions:
                output = output.unflatten(axis, (-1, positions))
                axis -= axis < 0
        elif site.flattened > 1:
            output = output.flatten(-site.flattened)
        if not -output.ndim <= axis < output.ndim or output.shape[axis] != site.neurons:
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
            for site in self.sites:
                tensor = site.output() if site.output is not None else None
                site.is_output = site.is_output or (tensor is not None and id(tensor) in returned)
                site.output = None
        # A model seldom changes its mind about what it returns: the first passes tell, then each power of two.
        self.noting = number < NOTED or number & (number - 1) == 0


class Hook(GraphHook):
    """A hook of an observer, which it does not keep alive."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = weakref.ref(observer)

    def listener(self) -> Observer | None:
        """The observer, if it lives, records, and this pass is new data."""
        observer = self._observer()
        return observer if observer and observer.recording and is_new_data() else None

    def taker(self) -> Observer | None:
        """The same, if it is the turn of this pass. Asked by each layer in each pass."""
        observer = self._observer()
        if observer is None or not observer.recording or not is_new_data():
            return None
        return observer if observer.every == 1 or observer.is_due() else None


class LayerHook(Hook):
    """Observes one layer."""

    def __init__(self, observer: Observer, site: Site) -> None:
        super().__init__(observer)
        self._site = site

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Forward hook of the layer."""
        if torch.compiler.is_compiling():
            self.in_graph(first_floating(output))
        elif (observer := self.taker()) is not None and (
            tensor := first_floating(output)
        ) is not None:
            if observer.noting and not self._site.is_output:
                self._site.output = weakref.ref(tensor)
            observer.take(self._site, tensor, module.training)

    def seen(self, tensor: Tensor) -> None:
        """Inside a compiled graph the mode is the model's at run time."""
        if (observer := self.taker()) is not None:
            observer.take(self._site, tensor, observer.model_is_training())


class ReadHook(LayerHook):
    """Observes one layer at the door of the module that reads it."""

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: object) -> None:
        """Forward pre-hook of the reading module."""
        if torch.compiler.is_compiling():
            self.in_graph(first_floating((args, kwargs)))
        elif (observer := self.taker()) is not None:
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
        elif (observer := self.listener()) is not None:
            observer.end_pass(first, output)

    def seen(self, tensor: Tensor) -> None:
        """What the model returned is not known here."""
        if (observer := self.listener()) is not None:
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
            forward_once(model, call, heard=True)
    finally:
        for handle in handles:
            handle.remove()
        detach_sites(observer)
        observer.recording = False
        observer.clear()


def attach(observer: Observer, model: nn.Module) -> list[RemovableHandle]:
    """Put the hooks on the model's door and on its layers; the handles take those of the door off again."""
    attach_sites(observer, model)
    return [
        watch_inputs(observer, model),
        model.register_forward_hook(LeaveHook(observer), with_kwargs=True),
    ]


def attach_sites(observer: Observer, model: nn.Module) -> None:
    """Put the hooks where the layers are observed now, and nowhere else."""
    detach_sites(observer)
    leaders: dict[tuple[Tap, int | None], Site] = {}
    modules = dict(model.named_modules())
    for site in observer.sites:
        site.leader = None
        if site.tap is not None and site.tap.module not in modules:  # it was removed
            site.tap, site.windows = None, {}
        if not observer.watches(site):
            continue
        if site.tap is None:
            module = model.get_submodule(site.name)
            # The layer's own output, whatever other hooks make of it.
            handle = module.register_forward_hook(LayerHook(observer, site), prepend=True)
        else:
            leader = leaders.setdefault((site.tap, site.neurons), site)
            if leader is not site:
                site.leader = leader
                continue
            module = model.get_submodule(site.tap.module)
            handle = module.register_forward_pre_hook(ReadHook(observer, site), with_kwargs=True)
        observer.handles.append(handle)


def detach_sites(observer: Observer) -> None:
    """Take the layers' hooks off."""
    while observer.handles:
        observer.handles.pop().remove()


def watch_inputs(observer: Observer, model: nn.Module) -> RemovableHandle:
    """Have the first forward pass supply the example inputs that tracing needs."""
    return model.register_forward_pre_hook(EnterHook(observer), with_kwargs=True)

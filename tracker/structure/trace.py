"""One real forward pass, seen operation by operation, from which the axes of all tensors follow."""

from __future__ import annotations

import itertools
import linecache
import os
import pathlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from tracker.errors import StructureError
from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import forward_once
from tracker.structure.axes import Axis, Labels
from tracker.structure.op_path import OpPathRecorder, Path
from tracker.structure.parameters_read import Reading
from tracker.structure.rule_failures import RuleFailure
from tracker.structure.weight_origins import Origin, Outputs, Weights, follow
from tracker.utils.nested import tensors_in

_TORCH = str(pathlib.Path(torch.__file__).parent) + os.sep  # and not torchvision
_HERE = pathlib.Path(__file__).parent
_OURS = (str(_HERE) + os.sep, str(_HERE.parent / "inputs" / "repeatable.py"))


class CallKey(NamedTuple):
    """One call of a module: its dotted path, and how many calls of it came before."""

    module: str
    number: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model calls an operation."""

    module: str  # dotted path of the innermost module
    file: str
    line: int

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        return (
            f"in {self.module or 'the model'} ({pathlib.Path(self.file).name}:{self.line}: {code})"
        )


@dataclass(slots=True)
class Op:
    """One call of an ATen operation, with all that a rule needs."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    trace: Trace
    source: Source
    before: tuple[tuple[int, ...], tuple[int, ...], int] = ((), (), 0)  # layout of the first input

    @property
    def labels(self) -> Labels:
        """The algebra that rules work in."""
        return self.trace.labels

    @property
    def out(self) -> Tensor:
        """The first (mostly the only) tensor of the result."""
        return self.result if isinstance(self.result, Tensor) else self.result[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, however it was passed, or its default."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def why(self, what: str = "") -> str:
        """A reason: what happens, in which operation, where."""
        name = self.func._schema.name.removeprefix("aten::")
        return f"{what or 'not understood'}: {name} {self.source}"

    def axes(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor, one for each dimension."""
        return self.trace.axes(tensor)

    def origin(self, tensor: Tensor) -> list[Origin]:
        """For each dimension, the dimensions of parameters that it came from."""
        return self.trace.weights.origin(tensor, self.trace.name(tensor))

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        return self.trace.weights.is_weight(tensor, self.trace.name(tensor))

    def parameters(self, tensor: Tensor) -> set[str]:
        """Names of the parameters that a tensor came from."""
        return {came.tensor for origin in self.origin(tensor) for came in origin}

    def give(self, tensor: Tensor, axes: list[Axis], origin: list[Origin] | None = None) -> None:
        """Say what the axes of a result are, and which dimensions of a parameter they are views of."""
        if origin is not None and any(origin):
            self.trace.weights.origins[tensor] = origin
        # Of a single index nothing can be removed.
        self.trace.known[tensor] = [
            None if n == 1 else a for n, a in zip(tensor.shape, axes, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ModuleInput:
    """A module's first input tensor: its axes, where they are known, and where to see it."""

    module: str
    axes: list[Axis] | None
    door: str = ""  # another module, whose input is the same but for dropout


# Of each call of a module its operations: name, and the axes of each tensor of the result.
CallAxes = dict[CallKey, list[tuple[str, list[list[Axis] | None]]]]


@dataclass(slots=True)
class Passes:
    """The calls of a model that were made, in their modes."""

    recorded: list[Call] = field(default_factory=list)
    # That do what a recorded one does, to the same weights.
    alike: list[Call] = field(default_factory=list)
    failed: list[tuple[Call, str]] = field(default_factory=list)  # could not be made, and why


@dataclass(slots=True)
class Trace:
    """What is known of the axes of a model's tensors, from one pass or several."""

    model: nn.Module
    labels: Labels = field(default_factory=Labels)
    known: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    weights: Weights = field(default_factory=Weights)  # and what is computed of them alone
    # Indices along an axis, of which nothing can die if they are used, and why.
    places: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    outputs: Outputs = field(default_factory=lambda: Outputs({}))  # where layers' neurons lie
    parameters: dict[str, list[Axis]] = field(default_factory=dict)  # of parameters and buffers
    reads: set[tuple[str, int]] = field(default_factory=set)  # (tensor, dim) that is contracted
    carries: set[str] = field(default_factory=set)  # tensors applied element by element
    order: list[str] = field(default_factory=list)  # tensors in the order of their first use
    names: dict[int, str] = field(default_factory=dict)  # id of a parameter or buffer → its key
    failures: list[RuleFailure] = field(default_factory=list)  # of users' rules, the first of each
    operations: int = 0  # of the first pass
    flops: int = 0  # of the first pass
    doors: list[ModuleInput] = field(
        default_factory=list
    )  # of modules with parameters, in order, of the first pass
    undropped: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    rows: list[CallAxes] = field(default_factory=list)  # of each pass
    read: Reading = field(default_factory=Reading)
    passes: Passes = field(default_factory=Passes)
    paths: list[Path] = field(default_factory=list)  # of the recorded passes

    def begin(self, call: Call, runs: nn.Module) -> None:
        """A pass begins: parameters and buffers are what they were at the beginning of the first."""
        self.passes.recorded.append(call)
        self.rows.append({})
        self.paths.append(Path(self.names))
        self.known, self.places = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.weights.begin((call.args, call.kwargs))
        self.undropped = WeakTensorKeyDictionary()

    def note_reading(self, given: object, result: object) -> None:
        """An operation was applied: it read the parameters that it was given, unless its result is a view of them."""
        if any(self.weights.viewed(tensor) for tensor in tensors_in(result)):
            return
        for tensor in tensors_in(given):
            if (name := self.names.get(id(tensor))) is not None:
                self.read.whole(name)
            elif (origin := self.weights.viewed(tensor)) is not None:
                self.read.part(self.axes(tensor), origin, self.parameters)

    def use(self, values: object) -> None:
        """Values are given to an operation, or to the caller: if they are places along an axis, it is frozen."""
        if self.places:
            for tensor in tensors_in(values):
                if (place := self.places.get(tensor)) is not None:
                    self.labels.freeze(*place)

    def called(self, name: str, module: nn.Module, inputs: object) -> None:
        """Note with which input a module is called; what a dropout passes on is rather seen at its door."""
        tensor = next(iter(tensors_in(inputs)), None)
        if self.outputs.is_door(name):
            self.weights.crossed(inputs)
        if tensor is None or len(self.rows) > 1:
            return
        at = ModuleInput(name, self.known.get(tensor))
        if isinstance(module, _DropoutNd):
            self.undropped.setdefault(tensor, at)
        elif next(module.parameters(recurse=False), None) is not None:
            before = self.undropped.get(tensor)
            self.doors.append(
                ModuleInput(name, at.axes)
                if before is None
                else ModuleInput(name, before.axes, before.module)
            )

    def returned(self, name: str, output: object) -> None:
        """Note what a module gave back: a layer's neurons lie in it."""
        if name in self.outputs.layers:
            self.outputs.note(name, self.known, output, self.labels)
        if self.outputs.is_door(name):
            self.weights.crossed(output)

    def axes(self, tensor: Tensor) -> list[Axis]:
        """Axes of a tensor; a parameter gets fresh labels at its first use."""
        found: list[Axis] | None = self.known.get(tensor)
        if found is None:
            found = self._first_use(tensor)
            self.known[tensor] = found
        return found

    def name(self, tensor: object) -> str | None:
        """Key in the state dict, if this is a parameter or a buffer."""
        return self.names.get(id(tensor))

    def _first_use(self, tensor: Tensor) -> list[Axis]:
        name = self.name(tensor)
        if name is None:
            return [None] * tensor.ndim  # data, or a constant made in Python
        if name in self.parameters:  # met in an earlier pass
            return self.parameters[name]
        axes: list[Axis] = [self.labels.fresh(n) if n > 1 else None for n in tensor.shape]
        self.parameters[name] = axes
        self.order.append(name)
        return axes


Listen = Callable[[Trace, list[CallKey]], AbstractContextManager[Any]]


def record(
    model: nn.Module,
    calls: Sequence[Call],
    rule: Any,
    *,
    runs: nn.Module | None = None,
    listen: Listen | None = None,
    axes: Mapping[str, int] | None = None,
) -> Trace:
    """Make each call in each of its modes (of `runs`, with the same parameters) and apply `rule` to every operation.

    The passes run without gradients, with fused kernels off, so that attention and recurrent layers are seen as the
    products and sums that they are. Buffers, flags and random states are as before afterwards. Of a pass that does the
    same as an earlier one only its path is looked at. A call in train mode that was asked for in no mode of its own may
    fail. `axes` names the neurons' axis of layers of which their class does not tell it.

    Raises:
        StructureError: A call failed.
    """
    trace = Trace(model, outputs=Outputs.of(model, axes))
    runs = model if runs is None else runs
    for each in dict.fromkeys((model, runs)):
        tensors = (*each.named_parameters(remove_duplicate=False), *each.named_buffers())
        for name, tensor in tensors:
            trace.names.setdefault(id(tensor), name)
    for call in calls:
        for made in call.modes():
            may_fail = call.training is None and made.training is True
            _record(trace, made, rule, runs, listen, may_fail=may_fail)
    trained = {
        call.method for call in (*trace.passes.recorded, *trace.passes.alike) if call.training
    }
    trace.passes.failed = [f for f in trace.passes.failed if f[0].method not in trained]
    trace.reads |= trace.weights.read_inside - trace.weights.met
    weights = (name for name, _ in model.named_parameters())
    trace.read.freeze_rest(trace.labels, trace.parameters, weights)
    return trace


def _record(
    trace: Trace, call: Call, rule: Any, runs: nn.Module, listen: Listen | None, *, may_fail: bool
) -> None:
    with plain_kernels():
        if trace.rows:
            glance = OpPathRecorder(trace.names)
            try:
                glance.path.end(forward_once(runs, call, within=glance))
            except StructureError as error:
                if not may_fail:
                    raise
                trace.passes.failed.append((call, str(error.__cause__ or error)))
                return
            if any(glance.path.rows == path.rows for path in trace.paths):
                trace.passes.alike.append(call)
                return
        at = [CallKey("", 0)]
        trace.begin(call, runs)
        recorder = _Recorder(trace, at, rule)
        within = _both(None if listen is None else listen(trace, at), recorder)
        try:
            with following(runs, at, trace.called, trace.returned):
                output = forward_once(runs, call, within=within)
        except StructureError as error:
            if not may_fail or listen is not None:
                raise
            for kept in (trace.passes.recorded, trace.rows, trace.paths):
                kept.pop()
            trace.passes.failed.append((call, str(error.__cause__ or error)))
            return
    recorder.path.end(output)
    trace.use(output)
    for tensor in tensors_in(output):
        for axis in trace.axes(tensor):
            trace.labels.freeze(axis, "it is part of the model's output")


@contextmanager
def following(
    model: nn.Module,
    path: list[CallKey],
    called: Callable[[str, nn.Module, object], None] = lambda *_: None,
    returned: Callable[[str, object], None] = lambda *_: None,
) -> Iterator[None]:
    """Keep in `path` the modules that are being called, the innermost last.

    `called` hears each, with its inputs, and `returned`, with its own output, whatever other hooks make of it.
    """
    calls: Counter[str] = Counter()

    def leave(module: nn.Module, args: object, output: object) -> None:
        path.pop()

    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: object, kwargs: object, name: str = name) -> None:
            path.append(CallKey(name, calls[name]))
            calls[name] += 1
            called(name, module, (args, kwargs))

        def end(module: nn.Module, args: object, output: object, name: str = name) -> None:
            returned(name, output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(end, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _both(
    outer: AbstractContextManager[Any] | None, inner: AbstractContextManager[Any]
) -> Iterator[None]:
    with outer or nullcontext(), inner:
        yield


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace, at: list[CallKey], rule: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.at, self.rule = trace, at, rule
        self.path = trace.paths[-1]
        self._first = len(trace.rows) == 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = _layout(args)
        result = func(*args, **kwargs)
        self.path.note(func, args, kwargs, result)
        self.trace.operations += self._first
        if self._first and (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.trace.flops += int(formula(*args, **kwargs, out_val=result))
        frame = user_frame(sys._getframe(1))
        call = self.at[-1]
        source = Source(call.module, frame.f_code.co_filename, frame.f_lineno)
        op = Op(func, args, kwargs, result, self.trace, source, before)
        self.trace.use((args, kwargs))
        self.rule(op)
        follow(op)
        axes = [self.trace.known.get(t) for t in tensors_in(result)]
        name = func._schema.name.removeprefix("aten::")
        self.trace.rows[-1].setdefault(call, []).append((name, axes))
        self.trace.note_reading((args, kwargs), result)
        if func.is_view and isinstance(result, Tensor) and args[0] in self.trace.undropped:
            self.trace.undropped[result] = self.trace.undropped[args[0]]
        return result


def _layout(args: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of the first input, which an operation in place may change."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.layout is not torch.strided:
        return (), (), 0
    return tuple(first.shape), first.stride(), int(first.storage_offset())


def user_frame(frame: FrameType | None) -> FrameType:
    """The innermost frame that is not torch's or ours; torch's modules stay, where there is no other."""
    innermost = frame
    while frame is not None:
        file = frame.f_code.co_filename
        in_torch = file.startswith(_TORCH)
        if not (in_torch or file.startswith(_OURS)):
            return frame
        if in_torch and "/nn/modules/" in file and not file.endswith("/module.py"):
            return frame
        frame = frame.f_back
    assert innermost is not None
    return innermost


class _OneByOne(TorchFunctionMode):
    """Grouped products are made one by one: the fused ones have few dtypes, and widths of 16 bytes alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("grouped_mm", "_grouped_mm") or len(args) != 2:
            return func(*args, **kwargs)
        a, b, ends = *args, kwargs.get("offs")
        if ends is None or a.ndim != 2 or b.ndim != 3:
            return func(*args, **kwargs)
        bounds = [0, *ends.tolist()]
        parts = [a[i:j] @ b[n] for n, (i, j) in enumerate(itertools.pairwise(bounds))]
        rest = a.new_zeros(len(a) - bounds[-1], b.shape[-1])  # rows of no group
        return torch.cat([*parts, rest])


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused kernels off: attention and recurrent layers run as products and sums."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # the switches warn of hardware that is not here
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_OneByOne())
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

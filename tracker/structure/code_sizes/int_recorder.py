"""What the model's code passes its integers for: during the recorded forward pass, sizes are heard and noted.

Sizes of tensors are handed out as integers that know their axis, and wherever an integer must be the number of indices
of an axis (a view, a slice, the groups of a convolution), an equation is noted with the line of code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tracker.structure.axes import Axis
from tracker.structure.code_sizes.cached_functions import sizes_not_cached
from tracker.structure.code_sizes.traced_int import (
    AxisSize,
    BinaryOp,
    Expr,
    TracedInt,
    expression,
    leaves,
    listeners,
)
from tracker.structure.trace import CallKey, Source, Trace, user_frame


@dataclass(frozen=True, slots=True)
class Equation:
    """An integer of the model's code, and the number of indices (left) of an axis that it must be."""

    expr: Expr
    axis: Axis
    size: int  # now; and always, where there is no axis
    source: Source
    or_more: bool = False  # a slice that ends behind the last index
    note: str = ""


class IntRecorder(TorchFunctionMode):
    """Notes an equation for every integer that a function of torch is called with."""

    def __init__(self, trace: Trace, path: list[CallKey]) -> None:
        super().__init__()
        self.trace, self.path = trace, path
        self.equations: dict[tuple[object, ...], Equation] = {}
        self._inside = ExitStack()

    def __enter__(self) -> Any:
        listeners.append(self.float_made)
        self._inside.enter_context(sizes_not_cached())
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if self.float_made in listeners:
            listeners.remove(self.float_made)
        self._inside.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPE:
            return self.shape(args[0], func(*args, **kwargs))
        if func is Tensor.size:
            sizes = self.shape(args[0], args[0].shape)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return sizes if dim is None else sizes[dim]
        result = func(*plain(args), **plain(kwargs))
        name = getattr(func, "__name__", "")
        hear = _HEARD.get(name)
        try:
            if hear is not None:
                hear(Call(self, args, kwargs, result))
                return result
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            pass  # called in a way that we do not know
        if name not in _GETTERS:
            for value in integers([args, kwargs]):
                if isinstance(value, TracedInt):
                    self.pin(value.expr, int(value), f"{name} is called with it")
        return result

    def shape(self, tensor: Tensor, sizes: torch.Size) -> Any:
        """The sizes of a tensor, each tied to its axis."""
        trace = self.trace
        axes = trace.axes(tensor) if trace.name(tensor) else trace.known.get(tensor)
        if axes is None or len(axes) != len(sizes) or all(axis is None for axis in axes):
            return sizes
        return torch.Size(
            n if axis is None else TracedInt(n, AxisSize(axis))
            for n, axis in zip(sizes, axes, strict=True)
        )

    def float_made(self, expr: Expr) -> None:
        """A float is made of an integer: what it scales would change with it."""
        self.pin(expr, None, "a number (a scale, say) is made of it")

    def pin(self, expr: Expr, value: int | None, note: str) -> None:
        """The integer must stay what it is."""
        self.add(Equation(expr, None, -1 if value is None else value, self.source(), note=note))

    def source(self) -> Source:
        """The line of the model's code that is being run."""
        frame = user_frame(sys._getframe(1))
        return Source(self.path[-1].module, frame.f_code.co_filename, frame.f_lineno)

    def add(self, equation: Equation) -> None:
        """Note an equation; what has neither an axis nor a leaf says nothing."""
        if equation.axis is None and not any(True for _ in leaves(equation.expr)):
            return
        axis = None if equation.axis is None else equation.axis.tobytes()
        key = (_key(equation.expr), axis, equation.size, equation.or_more, equation.note)
        self.equations.setdefault(key, equation)


def _key(expr: Expr) -> object:
    if isinstance(expr, BinaryOp):
        return expr.sign, _key(expr.left), _key(expr.right)
    return expr.axis.tobytes() if isinstance(expr, AxisSize) else expr


@dataclass(slots=True)
class Call:
    """One call of a function of torch."""

    recorder: IntRecorder
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs["input"]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, however it was passed."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def axis(self, tensor: Tensor, dim: int) -> Axis:
        """The axis of one dimension."""
        return self.recorder.trace.axes(tensor)[dim]

    def sizes(self, start: int, *names: str) -> list[Any]:
        """Integers given one by one or as one tuple."""
        for name in names:
            if name in self.kwargs:
                return list(self.kwargs[name])
        rest = self.args[start:]
        sizes = list(rest[0] if rest and isinstance(rest[0], (tuple, list)) else rest)
        if not all(isinstance(s, int) for s in sizes):
            raise TypeError("not sizes")
        return sizes

    def equal(self, value: Any, axis: Axis, size: int, *, or_more: bool = False) -> None:
        """An integer is the number of indices of an axis."""
        if not isinstance(value, TracedInt) and (axis is None or value == -1):
            return
        source = self.recorder.source()
        self.recorder.add(Equation(expression(value), axis, size, source, or_more))

    def all_equal(self, sizes: list[Any], tensor: Tensor, start: int = 0) -> None:
        """Integers are the sizes of a tensor's dimensions."""
        for d, size in enumerate(sizes, start):
            self.equal(size, self.axis(tensor, d), tensor.shape[d])


def _view(call: Call) -> None:
    call.all_equal(call.sizes(1, "shape", "size"), call.result)


def _unflatten(call: Call) -> None:
    dim = int(call.arg(1, "dim")) % call.x.ndim
    call.all_equal(list(call.arg(2, "sizes")), call.result, dim)


def _expand(call: Call) -> None:
    sizes = call.sizes(1, "size")
    call.all_equal(sizes, call.result, call.result.ndim - len(sizes))


def _repeat(call: Call) -> None:
    x, out, counts = call.x, call.result, call.sizes(1, "repeats", "dims")
    for d, count in zip(range(-len(counts), 0), counts, strict=True):
        size: Any = x.shape[d] if x.ndim >= -d else 1
        axis = call.axis(x, d) if size > 1 else None
        whole = BinaryOp("*", expression(count), size if axis is None else AxisSize(axis))
        source = call.recorder.source()
        call.recorder.add(Equation(whole, call.axis(out, d), out.shape[d], source))


def _new(start: int) -> Callable[[Call], None]:
    def hear(call: Call) -> None:
        call.all_equal(call.sizes(start, "size"), call.result)

    return hear


def _full(start: int) -> Callable[[Call], None]:
    def hear(call: Call) -> None:
        call.all_equal(list(call.arg(start, "size")), call.result)

    return hear


def _split(call: Call) -> None:
    given = call.arg(1, "split_size", call.kwargs.get("split_size_or_sections"))
    size: Any = call.kwargs.get("split_sizes") if given is None else given
    dim, parts = call.arg(2, "dim", 0), call.result
    if isinstance(size, int):
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            axis = call.axis(part, dim)
            call.equal(size, axis, part.shape[dim], or_more=last and part.shape[dim] < size)
    else:
        for each, part in zip(size, parts, strict=True):
            call.equal(each, call.axis(part, dim), part.shape[dim])


def _chunk(call: Call) -> None:
    count = call.arg(1, "chunks")
    call.equal(count, None, int(count))


def _narrow(call: Call) -> None:
    x, dim, start, length = call.x, int(call.args[1]), call.args[2], call.args[3]
    axis = call.axis(x, dim)
    first, end = int(start), int(start) + int(length)
    call.equal(start, None if axis is None else axis[:first], first)
    call.equal(length, None if axis is None else axis[first:end], int(length))


def _index(call: Call) -> None:
    x, index = call.x, call.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    width = sum(_consumed(p) for p in parts)
    d = 0
    for part in parts:
        if part is Ellipsis:
            d += x.ndim - width
            continue
        if isinstance(part, slice) and part.step in (None, 1):
            axis, n = call.axis(x, d), x.shape[d]
            for bound in (part.start, part.stop):
                if bound is not None:
                    _bound(call, bound, axis, n)
        elif isinstance(part, TracedInt):
            call.recorder.pin(part.expr, int(part), "it picks a position")
        d += _consumed(part)


def _bound(call: Call, bound: Any, axis: Axis, n: int) -> None:
    value = int(bound)
    if value == 0:
        call.equal(bound, None, 0)
    elif value >= n:
        call.equal(bound, axis, n, or_more=True)
    elif value > 0:
        call.equal(bound, None if axis is None else axis[:value], value)
    elif value > -n:
        back = bound.__neg__() if isinstance(bound, TracedInt) else -value
        call.equal(back, None if axis is None else axis[n + value :], -value)


def _consumed(part: Any) -> int:
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _normalized(call: Call) -> None:
    shape = list(call.arg(1, "normalized_shape"))
    call.all_equal(shape, call.x, call.x.ndim - len(shape))


def _groups(position: int, name: str) -> Callable[[Call], None]:
    def hear(call: Call) -> None:
        groups = call.arg(position, name, 1)
        n = int(groups)
        if n == 1 and not isinstance(groups, TracedInt):
            return
        channels, labels = call.axis(call.x, 1), call.recorder.trace.labels
        outer = labels.split(channels, [n, call.x.shape[1] // n], "groups")[0] if n > 1 else None
        call.equal(groups, outer, n)

    return hear


def _attention(call: Call) -> None:
    if call.kwargs.get("scale") is None and (width := call.axis(call.x, -1)) is not None:
        note = "the default scale is made of it"
        call.recorder.pin(AxisSize(width), call.x.shape[-1], note)


def _grouped_product(call: Call) -> None:
    for x in call.args[:2]:
        width, dim = 16 // x.element_size(), x.stride().index(1)
        if (axis := call.axis(x, dim)) is not None and width > 1:
            note = "a grouped product wants rows of 16 bytes"
            call.recorder.pin(BinaryOp("%", AxisSize(axis), width), 0, note)


def plain(value: Any) -> Any:
    """The same with plain integers."""
    kind = type(value)
    if kind is TracedInt:
        return int(value)
    if kind in (tuple, list):
        return kind(map(plain, value)) if any(True for _ in integers(value)) else value
    if kind is torch.Size:
        return torch.Size(map(int, value))
    if kind is dict:
        return {k: plain(v) for k, v in value.items()}
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def integers(value: Any) -> Iterator[int]:
    """Integers among arguments."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from integers(part)
    elif isinstance(value, dict):
        yield from integers(list(value.values()))
    elif isinstance(value, slice):
        yield from integers((value.start, value.stop, value.step))


_SHAPE = {Tensor.shape.__get__}  # type: ignore[attr-defined]
_GETTERS = {"__get__", "dim", "is_floating_point", "stride", "__contains__"}
_HEARD: dict[str, Callable[[Call], None]] = {
    "view": _view, "reshape": _view, "unflatten": _unflatten,
    "expand": _expand, "broadcast_to": _expand, "repeat": _repeat, "tile": _repeat,
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _new(0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _new(1)),
    "full": _full(0), "new_full": _full(1),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split), "chunk": _chunk,
    "narrow": _narrow, "__getitem__": _index, "__setitem__": _index,
    "layer_norm": _normalized, "rms_norm": _normalized, "group_norm": _groups(1, "num_groups"),
    **{f"conv{kind}{n}d": _groups(6, "groups") for kind in ("", "_transpose") for n in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
    "grouped_mm": _grouped_product, "_grouped_mm": _grouped_product,
}  # fmt: skip

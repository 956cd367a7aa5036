"""The operations of a forward pass, row by row: what a removal must leave as it was, and how far sizes shrink.

Numbers of the output may agree by accident (saturated, or zero); that the changed model runs the same operations,
with the same floats, on tensors of the sizes that follow from the removal, does not.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.structure.code_sizes.size_equations import Choice, Integers, resolved
from tracker.structure.trace import CallKey, Source, Trace, following, user_frame
from tracker.structure.trials.temporary_copies import is_lending
from tracker.utils.nested import tensors_in

LONGEST = 1 << 17  # indices; of longer axes (all positions of an image) sizes are not predicted
# Copies, casts and views: which of them run depends on memory layout and dtype (`as_strided_`: pooling to 1 × 1).
_NEUTRAL = (
    "_to_copy", "clone", "view", "_unsafe_view", "alias", "detach", "expand", "contiguous", "lift_fresh",
    "t", "transpose", "permute", "squeeze", "unsqueeze", "_reshape_alias", "as_strided_",
)  # fmt: skip
# After these, sizes and paths depend on values: which rows an expert is given, say.
_DECIDED = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_local_scalar_dense",
}

_NONE, _UNKNOWN = -1, -2  # in the place of an axis: its size stays; nothing is known
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One operation: its name, the floats it is called with, the shapes of its results."""

    op: str
    numbers: tuple[float, ...]
    shapes: tuple[Shape, ...]
    source: Source


class Stream(TorchDispatchMode):
    """Inside, notes the operations of a pass of `model`, for each call of each module; each pass anew."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[CallKey, list[Row]] = {}
        self._model, self._path = model, [CallKey("", 0)]
        self._hooks = ExitStack()

    def __enter__(self) -> Any:
        self.calls = {}
        self._hooks.enter_context(following(self._model, self._path))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_lending():
            return result
        name = func._schema.name.removeprefix("aten::")
        if name != "_to_copy":
            frame = user_frame(sys._getframe(1))
            source = Source(self._path[-1].module, frame.f_code.co_filename, frame.f_lineno)
            numbers = tuple(a for a in (*args, *(kwargs or {}).values()) if type(a) is float)
            shapes = tuple(tuple(t.shape) for t in tensors_in(result))
            self.calls.setdefault(self._path[-1], []).append(Row(name, numbers, shapes, source))
        return result


@dataclass(slots=True)
class Forecast:
    """The sizes that the results of all operations have after a removal, from the axes of the recorded pass."""

    integers: Integers = field(default_factory=Integers)
    # Of each pass and each call of a module in it.
    passes: list[dict[CallKey, list[tuple[str, tuple[tuple[int, ...], ...]]]]] = field(
        default_factory=list
    )
    axes: list[np.ndarray] = field(default_factory=list)  # label matrices, resolved

    @classmethod
    def of(cls, trace: Trace, integers: Integers) -> Forecast:
        """Number the axes of all results, with `_NONE` and `_UNKNOWN` where there is none to number."""
        self = cls(integers)
        numbers: dict[int, int] = {}
        same: dict[tuple[Shape, bytes], int] = {}

        def number(axis: np.ndarray | None) -> int:
            if axis is None:
                return _NONE
            if len(axis) > LONGEST:
                return _UNKNOWN
            if id(axis) not in numbers:
                matrix = resolved(trace.labels, axis)
                key = (matrix.shape, matrix.tobytes())
                if key not in same:
                    same[key] = len(self.axes)
                    self.axes.append(matrix)
                numbers[id(axis)] = same[key]
            return numbers[id(axis)]

        for calls in trace.rows:
            self.passes.append(
                {
                    call: [
                        (
                            op,
                            tuple(
                                () if axes is None else tuple(map(number, axes)) for axes in results
                            ),
                        )
                        for op, results in rows
                        if op != "_to_copy"
                    ]
                    for call, rows in calls.items()
                }
            )
        return self

    def sizes(self, choice: Choice) -> list[int]:
        """How many indices of each axis are left."""
        dead = self.integers.dead(choice)
        more = max((int(axis.max(initial=0)) for axis in self.axes), default=0) + 1 - len(dead)
        dead = np.concatenate((dead, np.zeros(max(0, more), dtype=bool)))
        return [int((~dead[axis].any(axis=1)).sum()) for axis in self.axes]


def differing(
    before: Stream,
    after: Stream,
    forecast: Forecast,
    choice: Choice,
    *,
    same: bool,
    number: int = 0,
) -> str:
    """What the operations of a model without these units do otherwise than those of the whole model, or "".

    `number` is that of the recorded pass.

    With `same`, both compute the same: each operation must find its like, and no size may change but those of axes that
    lose indices. Otherwise a path that data decides (which expert is asked) may differ, and is left out.
    """
    calls = forecast.passes[number] if number < len(forecast.passes) else {}
    left = forecast.sizes(choice) if forecast.integers.places else []
    whole = [len(axis) for axis in forecast.axes]
    rows = (row for stream in (before, after) for part in stream.calls.values() for row in part)
    same = same and not any(row.op in _DECIDED for row in rows)
    for call in dict.fromkeys((*before.calls, *after.calls)):
        old, new = before.calls.get(call, []), after.calls.get(call, [])
        axes = calls.get(call, [])
        expected = _expected(old, axes, left, whole, same=same)
        if [r.op for r in old] != [r.op for r in new]:
            alone = any(1 in s and 1 not in r.shapes[i] for r, e in zip(old, expected, strict=True)
                        for i, s in enumerate(e))  # fmt: skip
            if same and not alone and (why := _lost(old, new)):
                return why
            continue
        for was, now, sizes in zip(old, new, expected, strict=True):
            if why := _row(was, now, sizes):
                return why
    return ""


def _expected(
    old: Sequence[Row],
    axes: Sequence[tuple[str, tuple[tuple[int, ...], ...]]],
    left: Sequence[int],
    whole: Sequence[int],
    *,
    same: bool,
) -> list[tuple[tuple[int | None, ...], ...]]:
    """For each result of each operation its sizes after the removal; None where they are not known."""
    if not left or [r.op for r in old] != [op for op, _ in axes]:
        return [tuple((None,) * len(s) for s in row.shapes) for row in old]

    def size(n: int, axis: int) -> int | None:
        if axis < 0:
            return n if axis == _NONE and same else None
        # Where data decide, how many rows there are is no property of the model.
        return left[axis] if same or left[axis] != whole[axis] else None

    return [
        tuple(
            tuple(map(size, shape, result))
            if len(result) == len(shape) and 0 not in shape  # an empty part meets nothing
            else (None,) * len(shape)
            for shape, result in zip(row.shapes, results, strict=True)
        )
        for row, (_, results) in zip(old, axes, strict=True)
    ]


def _lost(old: Sequence[Row], new: Sequence[Row]) -> str:
    """An operation that only one of two calls runs, however torch makes its products of the layouts it finds."""
    counts = [Counter(part for row in rows for part in _parts(row.op)) for rows in (old, new)]
    for rows, gone, what in (
        (old, counts[0] - counts[1], "is missing"),
        (new, counts[1] - counts[0], "is new"),
    ):
        for row in rows:
            if gone.keys() & {*_parts(row.op)}:
                return f"the operation {row.op} {what} {row.source}"
    return ""


def _parts(op: str) -> tuple[str, ...]:
    if op in _NEUTRAL:
        return ()
    if op in ("addmm", "baddbmm", "addmv"):
        return "product", "add"
    return ("product",) if op in ("mm", "bmm", "mv", "dot") else (op.removesuffix("_"),)


def _row(was: Row, now: Row, expected: tuple[tuple[int | None, ...], ...]) -> str:
    if len(was.numbers) != len(now.numbers) or not all(map(_close, was.numbers, now.numbers)):
        return (
            f"a number in the model's code is made from theirs: {was.op} with {list(was.numbers)}, then with "
            f"{list(now.numbers)} {now.source}"
        )
    for shape, sizes in zip(now.shapes, expected, strict=False):
        wrong = len(shape) != len(sizes) or any(
            e is not None and e != n for n, e in zip(shape, sizes, strict=True)
        )
        if wrong:
            want = tuple("?" if e is None else e for e in sizes)
            return f"{now.op} gives {shape} where {want} is left {now.source}"
    return ""


def _close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b))

"""Rules of operations that move, join and part dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tracker.structure.axes import Axis
from tracker.structure.rules.registry import rule, together, unknown
from tracker.structure.trace import Op
from tracker.structure.weight_origins import NOWHERE, Origin

# Dimensions that only change places


@rule("aten::t", "aten::t_")
def t(op: Op) -> None:
    """Two dimensions change places."""
    op.give(op.out, op.axes(op.args[0])[::-1], op.origin(op.args[0])[::-1])


@rule("aten::transpose", "aten::transpose_")
def transpose(op: Op) -> None:
    """Two dimensions change places."""
    i, j = op.args[1], op.args[2]
    axes, origin = list(op.axes(op.args[0])), list(op.origin(op.args[0]))
    axes[i], axes[j] = axes[j], axes[i]
    origin[i], origin[j] = origin[j], origin[i]
    op.give(op.out, axes, origin)


@rule("aten::permute")
def permute(op: Op) -> None:
    """Dimensions change places."""
    axes, origin = op.axes(op.args[0]), op.origin(op.args[0])
    op.give(op.out, [axes[d] for d in op.args[1]], [origin[d] for d in op.args[1]])


@rule("aten::unsqueeze", "aten::unsqueeze_")
def unsqueeze(op: Op) -> None:
    """One dimension more."""
    at = op.args[1] % op.out.ndim
    axes, origin = list(op.axes(op.args[0])), list(op.origin(op.args[0]))
    axes.insert(at, None)
    origin.insert(at, NOWHERE)
    op.give(op.out, axes, origin)


@rule("aten::squeeze")
def squeeze(op: Op) -> None:
    """Dimensions of one index less."""
    x = op.args[0]
    dims = op.arg(1, "dim", range(x.ndim))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % x.ndim for d in dims if x.shape[d] == 1}
    stay = [d for d in range(x.ndim) if d not in gone]
    op.give(op.out, [op.axes(x)[d] for d in stay], [op.origin(x)[d] for d in stay])


@rule("aten::expand")
def expand(op: Op) -> None:
    """Along a dimension of one index, or a new one, a value is repeated, as often as what it will meet has indices."""
    x = op.args[0]
    new = op.out.ndim - x.ndim
    sizes, axes = [1] * new + list(x.shape), [None] * new + op.axes(x)
    axes = [
        axis if n == size else op.labels.repeated(n)
        for axis, size, n in zip(axes, sizes, op.out.shape, strict=True)
    ]
    op.give(op.out, axes, [*[NOWHERE] * new, *op.origin(x)])


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias")
def view(op: Op) -> None:
    """Neighbouring dimensions are merged and split; groups of equal size are taken one by one."""
    x, out = op.args[0], op.out
    axes, old, new = list(op.axes(x)), list(x.shape), list(out.shape)
    result: list[Axis] = []
    origin: list[Origin] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i + 1, j + 1
        while math.prod(old[i:a]) != math.prod(new[j:b]):
            if math.prod(old[i:a]) < math.prod(new[j:b]):
                a += 1
            else:
                b += 1
            if a > len(old) + 1 or b > len(new) + 1:
                return unknown(op)
        if a - i > 1 or b - j > 1:  # how often a value is repeated is no unit's number
            axes[i:a] = [None if op.labels.unmet(axis) else axis for axis in axes[i:a]]
        whole = (
            op.labels.merge(old[i:a], axes[i:a])
            if a - i > 1
            else (axes[i] if i < a <= len(old) else None)
        )
        parts = op.labels.split(whole, new[j:b], op.why("a reshape that the labels cannot follow"))
        result += parts[: len(new) - len(result)]
        came = NOWHERE.union(*op.origin(x)[i:a])
        origin += [came] * (len(result) - len(origin))
        i, j = a, b
    op.give(out, result, origin)
    return None


# Parts and wholes


@rule("aten::slice")
def slice_(op: Op) -> None:
    """A part of one dimension."""
    x, dim = op.args[0], op.arg(1, "dim", 0)
    axes = list(op.axes(x))
    axis, n = axes[dim], x.shape[dim]
    if axis is not None:
        start, stop, step = slice(
            op.arg(2, "start"), op.arg(3, "end"), op.arg(4, "step", 1)
        ).indices(n)
        axes[dim] = axis[start:stop:step]
    op.give(op.out, axes, op.origin(x))


@rule("aten::select")
def select(op: Op) -> None:
    """One index of a dimension, by its position: the others may not move."""
    x, dim = op.args[0], op.args[1]
    axes = list(op.axes(x))
    op.labels.freeze(axes.pop(dim % x.ndim), op.why("one position is picked"))
    op.give(op.out, axes, [o for d, o in enumerate(op.origin(x)) if d != dim % x.ndim])


@rule("aten::unbind")
def unbind(op: Op) -> None:
    """Each index of a dimension by itself."""
    x, dim = op.args[0], op.arg(1, "dim", 0)
    axes = list(op.axes(x))
    op.labels.freeze(axes.pop(dim % x.ndim), op.why("each position is picked"))
    origin = [o for d, o in enumerate(op.origin(x)) if d != dim % x.ndim]
    for out in op.result:
        op.give(out, axes, origin)


@rule(
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unsafe_split", "aten::unsafe_chunk",
    "aten::unsafe_split_with_sizes",
)  # fmt: skip
def split(op: Op) -> None:
    """Parts of one dimension; equal parts must stay equal, so their indices die together."""
    x, dim = op.args[0], op.arg(2, "dim", 0)
    axis, start, first = op.axes(x)[dim], 0, None
    equal = len({out.shape[dim] for out in op.result}) == 1
    for out in op.result:
        axes, n = list(op.axes(x)), out.shape[dim]
        if axis is not None:
            axes[dim] = axis[start : start + n]
            if equal and first is not None:
                op.labels.unify(first, axes[dim], op.why("equal parts"))
            first = axes[dim] if first is None else first
        start += n
        op.give(out, axes, op.origin(x))


@rule("aten::cat")
def cat(op: Op) -> None:
    """One dimension behind another; the others die alike."""
    parts, dim = [p for p in op.args[0] if p.numel()], op.arg(1, "dim", 0)
    ndim = op.out.ndim
    axes = [
        together(op, [op.axes(p)[d] for p in parts]) if d != dim % ndim else None
        for d in range(ndim)
    ]
    pieces = [op.axes(p)[dim] for p in parts]
    if any(piece is not None for piece in pieces):
        width = max(piece.shape[1] for piece in pieces if piece is not None)
        axes[dim % ndim] = torch.cat(
            [_padded(piece, p.shape[dim], width) for piece, p in zip(pieces, parts, strict=True)]
        ).numpy()
    op.give(op.out, axes)


def _padded(axis: Axis, n: int, width: int) -> Tensor:
    padded = torch.zeros((n, width), dtype=torch.int64)
    if axis is not None:
        padded[:, : axis.shape[1]] = torch.from_numpy(axis)
    return padded


@rule("aten::stack")
def stack(op: Op) -> None:
    """A new dimension, by position."""
    dim = op.arg(1, "dim", 0) % op.out.ndim
    parts = op.args[0]
    axes = [together(op, [op.axes(p)[d] for p in parts]) for d in range(parts[0].ndim)]
    op.give(op.out, [*axes[:dim], None, *axes[dim:]])


@rule("aten::constant_pad_nd")
def pad(op: Op) -> None:
    """Padded dimensions change their positions."""
    x, widths = op.args[0], op.args[1]
    axes = list(op.axes(x))
    for k in range(0, len(widths), 2):
        if widths[k] or widths[k + 1]:
            d = -1 - k // 2
            op.labels.freeze(axes[d], op.why("padded"))
            axes[d] = None
    op.give(op.out, axes)

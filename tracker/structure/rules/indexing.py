"""Rules of operations that pick, write, order or move along dimensions: those are frozen, the others pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tracker.structure.axes import Axis
from tracker.structure.rules.registry import pointwise, rule, same, together, unknown
from tracker.structure.trace import Op
from tracker.structure.weight_origins import NOWHERE, Origin
from tracker.utils.nested import tensors_in


def kept(op: Op, x: Tensor, dims: Iterable[int], why: str) -> tuple[list[Axis], list[Origin]]:
    """Axes and origin of a tensor, without those of `dims`, which are frozen."""
    gone = {d % x.ndim for d in dims} if x.ndim else set()
    axes, origin = op.axes(x), op.origin(x)
    for d in gone:
        op.labels.freeze(axes[d], op.why(why))
    return (
        [None if d in gone else a for d, a in enumerate(axes)],
        [NOWHERE if d in gone else o for d, o in enumerate(origin)],
    )


def freeze_all(op: Op, why: str, *values: Any) -> None:
    """Nothing along any dimension of these tensors can die."""
    for tensor in tensors_in(values):
        for axis in op.axes(tensor):
            op.labels.freeze(axis, op.why(why))


def as_dims(x: Tensor, dims: Any) -> list[int]:
    """Dimensions as a list; none given are all."""
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(x.ndim))
    return [dims] if isinstance(dims, int) else list(dims)


# Along dimensions


@rule("aten::cumsum", "aten::cumsum_", "aten::cumprod", "aten::cumprod_", "aten::cummax", "aten::cummin",
      "aten::logcumsumexp", "aten::_logcumsumexp", "aten::sort", "aten::flip")  # fmt: skip
def ordered(op: Op) -> None:
    """Each value along a dimension depends on the order of the others."""
    x = op.args[0]
    dims = op.arg(1, "dims" if "flip" in op.func._schema.name else "dim", -1)
    if not isinstance(dims, int) and not isinstance(dims, Sequence):
        return unknown(op)
    dims = [dims] if isinstance(dims, int) else dims
    axes, origin = kept(op, x, dims, "its order counts")
    for out in tensors_in(op.result):
        op.give(out, axes, origin)
    return None


@rule("aten::roll")
def roll(op: Op) -> None:
    """Without dimensions, it rolls all values as one row."""
    x = op.args[0]
    op.give(op.out, *kept(op, x, as_dims(x, op.arg(2, "dims")), "rolled along"))


@rule("aten::max", "aten::min")
def extreme(op: Op) -> None:
    """The largest value along a dimension sees what is removed; where it lies, no other can be removed."""
    x, dim = op.args[0], op.arg(1, "dim", None)
    if len(tensors_in([op.args, op.kwargs])) > 1:
        return pointwise(op)
    gone, axes = {d % x.ndim for d in as_dims(x, dim)} if x.ndim else set(), op.axes(x)
    for d in gone:
        op.labels.mark_inexact(axes[d], op.why("reduced over"))
    for out in tensors_in(op.result):
        same_rank = out.ndim == x.ndim
        stay = [None if d in gone else a for d, a in enumerate(axes) if same_rank or d not in gone]
        op.give(out, stay)
    for places in tensors_in(op.result)[1:]:
        for d in gone:
            op.trace.places[places] = axes[d], op.why("the place of a value is used")
    return None


@rule("aten::topk", "aten::kthvalue", "aten::median", "aten::nanmedian", "aten::mode",
      "aten::argmax", "aten::argmin")  # fmt: skip
def picked(op: Op) -> None:
    """Values picked along a dimension, or the positions of them."""
    x, name = op.args[0], op.func._schema.name.removeprefix("aten::")
    dim = op.arg(2 if name in ("topk", "kthvalue") else 1, "dim", None)
    if name in ("topk", "kthvalue", "mode"):
        dim = -1 if dim is None else dim
    if not isinstance(dim, int | None) or len(tensors_in([op.args, op.kwargs])) > 1:
        return unknown(op)
    axes, origin = kept(op, x, as_dims(x, dim), "values are picked by their size")
    for out in tensors_in(op.result):
        stay = [d for d in range(x.ndim) if dim is not None and d != dim % x.ndim]
        stay = list(range(x.ndim)) if out.ndim == x.ndim else stay
        op.give(out, [axes[d] for d in stay], [origin[d] for d in stay])
    return None


@rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def fourier(op: Op) -> None:
    """Every frequency is made of all positions."""
    op.give(op.out, kept(op, op.args[0], op.args[1], "transformed along")[0])


@rule("aten::view_as_real")
def view_as_real(op: Op) -> None:
    """One dimension more, of two."""
    x = op.args[0]
    op.give(op.out, [*op.axes(x), None], [*op.origin(x), NOWHERE])


@rule("aten::view_as_complex")
def view_as_complex(op: Op) -> None:
    """The last dimension, of two, goes."""
    axes, origin = kept(op, op.args[0], [-1], "real and imaginary part")
    op.give(op.out, axes[:-1], origin[:-1])


@rule("aten::diagonal")
def diagonal(op: Op) -> None:
    """Two dimensions become one, which is the last."""
    x = op.args[0]
    pair = [op.arg(2, "dim1", 0) % x.ndim, op.arg(3, "dim2", 1) % x.ndim]
    axes, _ = kept(op, x, pair, "its diagonal is picked")
    op.give(op.out, [*(a for d, a in enumerate(axes) if d not in pair), None])


@rule("aten::unfold")
def unfold(op: Op) -> None:
    """Windows along one dimension; what is in a window is the last dimension."""
    axes, _ = kept(op, op.args[0], [op.args[1]], "a window runs along it")
    op.give(op.out, [*axes, None])


@rule("aten::repeat")
def repeat(op: Op) -> None:
    """The whole again and again: a repeated index dies in every repetition."""
    x, times = op.args[0], op.args[1]
    new = len(times) - x.ndim
    axes: list[Axis] = [op.labels.repeated(k) for k in times[:new]]
    for n, k, axis in zip(x.shape, times[new:], op.axes(x), strict=True):
        if n == 1:
            axes.append(op.labels.repeated(k))
        else:
            axes.append(axis if k == 1 or axis is None else op.labels.merge([k, n], [None, axis]))
    if 0 in times:
        return unknown(op)
    return op.give(op.out, axes)


@rule("aten::as_strided", "aten::as_strided_")
def as_strided(op: Op) -> None:
    """The same values at the same places, in other words."""
    shape, stride, offset = op.before
    out = op.out
    at = [s for s, n in zip(stride, shape, strict=True) if n != 1]
    now = [s for s, n in zip(out.stride(), out.shape, strict=True) if n != 1]
    if tuple(out.shape) != shape or at != now or out.storage_offset() != offset:
        return unknown(op)
    return same(op)


# Picked by data


@rule("aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::masked_select",
      "aten::histc", "aten::bincount", "aten::bucketize", "aten::searchsorted")  # fmt: skip
def by_data(op: Op) -> None:
    """What comes out, and how much of it, depends on the values."""
    freeze_all(op, "values decide what is picked", op.args, op.kwargs)


@rule("aten::index_select")
def index_select(op: Op) -> None:
    """Indices of one dimension, picked by data."""
    x, dim, index = op.args
    freeze_all(op, "it picks", index)
    op.give(op.out, *kept(op, x, [dim], "picked by data"))


def _selection(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[int | None], set[int]]:
    """For each dimension of x[indices] the one of x that it is, if any; and those that are picked."""
    flags: list[bool] = []
    wide = 1
    for index in indices:
        if index is None:
            flags.append(False)
        elif index.dtype in (torch.bool, torch.uint8):
            if index.ndim == 0:
                raise ValueError("a single truth value adds a dimension")
            flags += [True] * index.ndim
        else:
            flags.append(True)
            wide = max(wide, index.ndim)
    if all(i is None or (i.ndim == 0 and i.dtype != torch.bool) for i in indices):
        wide = 0
    flags += [False] * (x.ndim - len(flags))
    chosen = [d for d, flag in enumerate(flags) if flag]
    adjacent = bool(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1
    first = chosen[0] if adjacent else 0  # what lies apart comes to the front
    layout: list[int | None] = [d for d, flag in enumerate(flags) if not flag]
    layout[first:first] = [None] * wide
    return layout, set(chosen)


@rule("aten::index", "aten::_unsafe_index")
def index(op: Op) -> None:
    """Some dimensions are picked by tensors; together they make the dimensions of those."""
    x, indices = op.args[0], op.args[1]
    layout, chosen = _selection(x, indices)
    freeze_all(op, "it picks", indices)
    axes, origin = kept(op, x, chosen, "picked by data")
    if len(layout) != op.out.ndim:
        return unknown(op)
    return op.give(
        op.out,
        [None if d is None else axes[d] for d in layout],
        [NOWHERE if d is None else origin[d] for d in layout],
    )


@rule("aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put")
def index_put(op: Op) -> None:
    """Written at picked places; the other dimensions die alike with what is written."""
    x, indices, values = op.args[0], op.args[1], op.args[2]
    if _is_fill(x, indices, values):
        return pointwise(op)
    layout, chosen = _selection(x, indices)
    freeze_all(op, "it picks", indices)
    axes, _ = kept(op, x, chosen, "written where data says")
    if values.ndim > len(layout):
        return unknown(op)
    for k in range(-values.ndim, 0):
        d, axis = layout[k], op.axes(values)[k]
        if d is None or values.shape[k] != x.shape[d]:
            op.labels.freeze(axis, op.why("written where data says"))
        elif values.shape[k] != 1:
            axes[d] = op.labels.unify(axes[d], axis, op.why("combined with values of a fixed size"))
    return op.give(op.out, axes)


def _is_fill(x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> bool:
    """One value wherever a mask over the last dimensions says so, as `masked_fill` does it."""
    return (
        values.ndim == 0
        and isinstance(indices[-1], Tensor)
        and indices[-1].dtype == torch.bool
        and indices[-1].ndim + len(indices) - 1 == x.ndim
        and all(index is None for index in indices[:-1])
    )


def _alike(op: Op, dim: int, parts: Sequence[Tensor]) -> list[Axis]:
    """Axes of tensors that lie on each other except along `dim`, which is frozen."""
    axes: list[Axis] = []
    for d in range(parts[0].ndim):
        met = [op.axes(part)[d] for part in parts]
        equal = len({part.shape[d] for part in parts}) == 1
        if d == dim % parts[0].ndim or not equal:
            for axis in met:
                op.labels.freeze(axis, op.why("picked by data"))
            axes.append(None)
        else:
            axes.append(together(op, met))
    return axes


@rule("aten::gather")
def gather(op: Op) -> None:
    """For each place of the index one value along a dimension."""
    x, dim, index = op.args[0], op.args[1], op.args[2]
    op.give(op.out, _alike(op, dim, [x, index]))


@rule("aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_", "aten::scatter_reduce",
      "aten::scatter_reduce_")  # fmt: skip
def scatter(op: Op) -> None:
    """For each place of the index one value is written along a dimension."""
    x, dim, index, *source = op.args[:4]
    source = source or [op.kwargs.get("src")]
    given = [s for s in source if isinstance(s, Tensor) and s.ndim]
    op.give(op.out, _alike(op, dim, [x, index, *given]))


@rule("aten::index_add", "aten::index_add_", "aten::index_copy", "aten::index_copy_", "aten::index_fill",
      "aten::index_fill_", "aten::index_reduce", "aten::index_reduce_")  # fmt: skip
def index_write(op: Op) -> None:
    """Slices are written along one dimension, where data says."""
    x, dim, index, source = op.args[:4]
    freeze_all(op, "it picks", index)
    given = [source] if isinstance(source, Tensor) and source.ndim else []
    op.give(op.out, _alike(op, dim, [x, *given]))


# Channels and positions change into each other


@rule("aten::pixel_shuffle")
def pixel_shuffle(op: Op) -> None:
    """(…, C·r², H, W) → (…, C, H·r, W·r)."""
    x, r = op.args[0], op.args[1]
    axes, _ = kept(op, x, [-1, -2], "shuffled with channels")
    why = op.why("channels become positions")
    channels, inside = op.labels.split(axes[-3], [x.shape[-3] // r**2, r**2], why)
    op.labels.freeze(inside, why)
    op.give(op.out, [*axes[:-3], channels, None, None])


@rule("aten::pixel_unshuffle")
def pixel_unshuffle(op: Op) -> None:
    """(…, C, H·r, W·r) → (…, C·r², H, W)."""
    x, r = op.args[0], op.args[1]
    axes, _ = kept(op, x, [-1, -2], "shuffled with channels")
    channels = op.labels.merge([x.shape[-3], r**2], [axes[-3], None])
    op.give(op.out, [*axes[:-3], channels, None, None])


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(op: Op) -> None:
    """Groups of channels are dealt out like cards: as many groups stay, of equal size."""
    x, groups = op.args[0], op.args[1]
    axes, each = list(op.axes(x)), x.shape[1] // groups
    why = op.why("groups that are shuffled")
    group, inside = op.labels.split(axes[1], [groups, each], why)
    op.labels.freeze(group, why)
    axes[1] = op.labels.merge([each, groups], [inside, None])
    op.give(op.out, axes)


@rule("aten::im2col")
def im2col(op: Op) -> None:
    """(…, C, H, W) → (…, C·window, positions)."""
    x, window = op.args[0], op.args[1]
    axes, _ = kept(op, x, [-1, -2], "a window runs along it")
    size = window[0] * window[1]
    op.give(op.out, [*axes[:-3], op.labels.merge([x.shape[-3], size], [axes[-3], None]), None])


@rule("aten::col2im")
def col2im(op: Op) -> None:
    """(…, C·window, positions) → (…, C, H, W)."""
    x, window = op.args[0], op.args[2]
    size, why = window[0] * window[1], op.why("a window's own positions")
    axes, _ = kept(op, x, [-1], "a window runs along it")
    channels, inside = op.labels.split(axes[-2], [x.shape[-2] // size, size], why)
    op.labels.freeze(inside, why)
    op.give(op.out, [*axes[:-2], channels, None, None])


@rule("aten::glu")
def glu(op: Op) -> None:
    """One half of a dimension times the sigmoid of the other: both die alike."""
    x = op.args[0]
    dim = op.arg(1, "dim", -1) % x.ndim
    axes, half = list(op.axes(x)), x.shape[dim] // 2
    axis = axes[dim]
    if axis is not None:
        axes[dim] = op.labels.unify(axis[:half], axis[half:], op.why("equal parts"))
    op.give(op.out, axes)


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::_grid_sampler_2d_cpu_fallback")
def grid_sampler(op: Op) -> None:
    """Channels stay, positions are picked by a grid."""
    x, grid = op.args[0], op.args[1]
    freeze_all(op, "it picks positions", grid)
    op.give(op.out, kept(op, x, range(2, x.ndim), "positions are picked by data")[0])


@rule("aten::max_unpool2d", "aten::max_unpool3d")
def unpool(op: Op) -> None:
    """Values go back to the positions that a pool found them at."""
    spatial = 3 if "3d" in op.func._schema.name else 2
    (axes, _), (at, _) = (kept(op, t, range(-spatial, 0), "unpooled along") for t in op.args[:2])
    op.give(op.out, [together(op, pair) for pair in zip(axes, at, strict=True)])


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(op: Op) -> None:
    """Rows are picked by data and added up, or the like; each row's dimensions go on."""
    weight = op.args[0]
    freeze_all(op, "it picks", op.args[1:], op.kwargs)
    op.give(op.out, kept(op, weight, [0], "rows are picked by data")[0])

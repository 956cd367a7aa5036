"""Rules of operations that compute: products and sums, in which units are read, and norms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tracker.structure.axes import Axis
from tracker.structure.rules.registry import pointwise, rule, together
from tracker.structure.trace import Op
from tracker.structure.weight_origins import MULTIPLIED, NOWHERE
from tracker.utils.nested import tensors_in

# Contractions: here units are read


def contract(op: Op, a: Tensor, i: int, b: Tensor, j: int) -> None:
    """Dimension i of a and j of b are multiplied and added up."""
    why = op.why("multiplied with values of a fixed size")
    note_read(op, a, i, b)
    note_read(op, b, j, a)
    op.labels.unify(op.axes(a)[i], op.axes(b)[j], why)


def note_read(op: Op, x: Tensor, i: int, other: Tensor) -> None:
    """Dimension i of x is added up over, multiplied with another tensor.

    An activation reads whatever a weight was computed from. Where weights alone are multiplied, what an earlier product
    gave is no column of this one, and nothing is that activations meet themselves.
    """
    origin = op.origin(x)[i]
    sides = op.is_weight(x), op.is_weight(other)
    among_weights = all(sides)
    why = op.why("a weight is added up over it, beside the product with what it reads")
    op.trace.weights.read(x, i, other, origin, sides, why)
    if among_weights and not _is_nothing(op, other):
        op.trace.weights.fold(origin, op.why("a weight is computed by adding up over it"))
    if among_weights:
        op.trace.weights.read_inside |= {(c.tensor, c.dim) for c in origin if c.how != MULTIPLIED}
    else:
        op.trace.reads |= {(c.tensor, c.dim) for c in origin}


def _is_nothing(op: Op, x: Tensor) -> bool:
    """Zeros that no parameter has a part in, such as the state that a recurrent layer starts from."""
    return not any(op.origin(x)) and not bool(x.any())


@rule("aten::mm", "aten::bmm")
def mm(op: Op) -> None:
    """(…, n, k) (…, k, m) → (…, n, m)."""
    a, b = op.args[0], op.args[1]
    _matmul(op, a, b)


@rule("aten::addmm", "aten::baddbmm")
def addmm(op: Op) -> None:
    """A product, and a bias that is broadcast over it."""
    bias, a, b = op.args[0], op.args[1], op.args[2]
    _matmul(op, a, b)
    _add_bias(op, bias, range(-op.out.ndim, 0))


@rule("aten::mv", "aten::dot", "aten::vdot")
def mv(op: Op) -> None:
    """(n, k) (k) → (n); (k) (k) → a number."""
    a, b = op.args[0], op.args[1]
    contract(op, a, -1, b, 0)
    op.give(op.out, op.axes(a)[:-1])


@rule("aten::addmv")
def addmv(op: Op) -> None:
    """A product with a vector, and a bias."""
    bias, a, b = op.args[0], op.args[1], op.args[2]
    contract(op, a, -1, b, 0)
    op.give(op.out, op.axes(a)[:-1])
    _add_bias(op, bias, [-1])


def _matmul(op: Op, a: Tensor, b: Tensor) -> None:
    contract(op, a, -1, b, -2)
    batch = [together(op, [op.axes(a)[d], op.axes(b)[d]]) for d in range(a.ndim - 2)]
    op.give(op.out, [*batch, op.axes(a)[-2], op.axes(b)[-1]])


def _add_bias(op: Op, bias: Tensor, dims: Sequence[int]) -> None:
    for d in dims:
        if bias.ndim >= -d and bias.shape[d] == op.out.shape[d] != 1:
            op.labels.unify(op.axes(op.out)[d], op.axes(bias)[d], op.why("a bias"))


@rule("aten::convolution")
def convolution(op: Op) -> None:
    """Input (N, C, …), weight (O, C/groups, …), or (C, O/groups, …) when transposed."""
    x, w, bias, transposed, groups = op.args[0], op.args[1], op.args[2], op.args[6], op.args[8]
    channels, wide = op.axes(x)[1], op.axes(w)
    for axis in op.axes(x)[2:]:
        op.labels.freeze(axis, op.why("a filter runs along it"))
    for axis in wide[2:]:
        op.labels.freeze(axis, op.why("a filter's own positions"))
    why = op.why("grouped channels")
    if groups == 1:
        contract(op, x, 1, w, 0 if transposed else 1)
        out = wide[1] if transposed else wide[0]
    elif w.shape[1] == 1 and w.shape[0] == groups and x.shape[1] == groups and not transposed:
        out = op.labels.unify(channels, wide[0], why)  # depthwise: a channel stays a channel
        op.trace.carries |= op.parameters(w)
    else:
        out = _grouped(op, x, w, groups, transposed, why)
    op.give(op.out, [None, out] + [None] * (op.out.ndim - 2))
    if bias is not None:
        op.labels.unify(out, op.axes(bias)[0], op.why("a bias"))


def _grouped(op: Op, x: Tensor, w: Tensor, groups: int, transposed: bool, why: str) -> Axis:
    labels = op.labels
    group, inside = labels.split(op.axes(x)[1], [groups, x.shape[1] // groups], why)
    rows, columns = op.axes(w)[0], op.axes(w)[1]
    group_w, per_group = labels.split(rows, [groups, w.shape[0] // groups], why)
    group = labels.unify(group, group_w, why)
    read, made = (per_group, columns) if transposed else (columns, per_group)
    note_read(op, w, 0 if transposed else 1, x)
    labels.unify(inside, read, why)
    return labels.merge([groups, op.out.shape[1] // groups], [group, made])


@rule("aten::_prelu_kernel", "aten::hardswish", "aten::hardswish_")
def untagged(op: Op) -> None:
    """Pointwise, but not marked so by torch."""
    pointwise(op)


@rule("aten::_weight_norm_interface")
def weight_norm(op: Op) -> None:
    """v·g/‖v‖ along one dimension: the norm sees every other dimension of v."""
    v, g, kept = op.args[0], op.args[1], op.arg(2, "dim", 0) % op.args[0].ndim
    axes: list[Axis] = []
    for d, axis in enumerate(op.axes(v)):
        if d != kept:
            op.labels.mark_inexact(axis, op.why("a weight is divided by a norm over it"))
        axes.append(op.labels.unify(axis, op.axes(g)[d], op.why()) if d == kept else axis)
    op.give(op.out, axes)


@rule("aten::_cdist_forward", "aten::_euclidean_dist")
def cdist(op: Op) -> None:
    """(…, n, k) (…, m, k) → (…, n, m): distances run over k, and what one side lacks is no zero in them."""
    a, b = op.args[0], op.args[1]
    inside = op.labels.unify(
        op.axes(a)[-1], op.axes(b)[-1], op.why("compared with values of a fixed size")
    )
    op.labels.mark_inexact(inside, op.why("distances run over it"))
    for side in (a, b):
        op.trace.carries |= op.parameters(side)
    axes: list[Axis] = []
    for d in range(-op.out.ndim, -2):
        met = [op.axes(t)[d] for t in (a, b) if t.ndim >= -d and t.shape[d] == op.out.shape[d] != 1]
        axes.append(together(op, met))
    op.give(op.out, [*axes, op.axes(a)[-2], op.axes(b)[-2]])


# Norms, reductions


@rule(
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
    "aten::cudnn_batch_norm",
)
def batch_norm(op: Op) -> None:
    """Weight, bias, running mean and variance for each channel."""
    x, *each = op.args[:5]
    axes = list(op.axes(x))
    for tensor in each:
        if tensor is not None:
            axes[1] = op.labels.unify(axes[1], op.axes(tensor)[0], op.why("a batch norm"))
            op.trace.carries |= op.parameters(tensor)
    op.give(op.out, axes)


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(op: Op) -> None:
    """Mean and variance run over the last dimensions: what is removed changes the others."""
    x, shape = op.args[0], op.args[1]
    axes = list(op.axes(x))
    for tensor in op.args[2:4]:
        if isinstance(tensor, Tensor):
            for d in range(-len(shape), 0):
                axes[d] = op.labels.unify(axes[d], op.axes(tensor)[d], op.why("a norm"))
            op.trace.carries |= op.parameters(tensor)
    for d in range(-len(shape), 0):
        op.labels.mark_inexact(axes[d], op.why("normalised over"))
    op.give(op.out, axes)


@rule("aten::native_group_norm")
def group_norm(op: Op) -> None:
    """Mean and variance of each group of channels: all groups must stay of one size."""
    x, w, b, groups = op.args[0], op.args[1], op.args[2], op.args[6]
    axes = list(op.axes(x))
    for tensor in (w, b):
        if tensor is not None:
            axes[1] = op.labels.unify(axes[1], op.axes(tensor)[0], op.why("a group norm"))
            op.trace.carries |= op.parameters(tensor)
    _, inside = op.labels.split(axes[1], [groups, x.shape[1] // groups], op.why("groups of a norm"))
    op.labels.mark_inexact(inside, op.why("normalised over"))
    op.give(op.out, axes)


@rule("aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax")
def softmax(op: Op) -> None:
    """Each index is divided by a sum over all of them."""
    x, dim = op.args[0], op.args[1]
    op.labels.mark_inexact(op.axes(x)[dim], op.why("a softmax over it"))
    op.give(op.out, op.axes(x))


_NEUTRAL = ("aten::sum", "aten::nansum", "aten::count_nonzero")


@rule("aten::sum", "aten::nansum", "aten::count_nonzero", "aten::mean", "aten::amax", "aten::amin", "aten::aminmax",
      "aten::var", "aten::var_mean", "aten::std", "aten::std_mean", "aten::prod", "aten::logsumexp", "aten::any",
      "aten::all")  # fmt: skip
def reduction(op: Op) -> None:
    """Dimensions go; only a sum does not see how many indices there were."""
    _reduce(op, op.arg(1, "dim", None), op.func._schema.name in _NEUTRAL)


@rule("aten::linalg_vector_norm", "aten::norm")
def vector_norm(op: Op) -> None:
    """Like a sum: a zero more or less does not change it, if the power is not negative."""
    power = op.arg(1, "ord" if "linalg" in op.func._schema.name else "p", 2)
    _reduce(op, op.arg(2, "dim", None), power is None or power >= 0)


def _reduce(op: Op, dims: int | Sequence[int] | None, neutral: bool) -> None:
    x = op.args[0]
    dims = (
        range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    )
    gone = {d % x.ndim for d in dims} if x.ndim else set()
    axes = op.axes(x)
    for d in gone:
        if op.is_weight(x) and any(op.origin(x)):
            op.labels.mark_inexact(axes[d], op.why("a weight is computed by adding up over it"))
        op.trace.weights.modulated.fold(
            op.trace.weights.factors.get(x, [NOWHERE] * x.ndim)[d],
            op.why("a weight times an activation is added up over it"),
        )
        if not neutral:
            op.labels.mark_inexact(axes[d], op.why("reduced over"))
    for out in tensors_in(op.result):
        keep = out.ndim == x.ndim
        stay = [None if d in gone else a for d, a in enumerate(axes) if keep or d not in gone]
        op.give(out, stay)


@rule("aten::max_pool1d", "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices",
      "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d", "aten::adaptive_avg_pool1d",
      "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_max_pool1d",
      "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d", "aten::upsample_nearest1d", "aten::upsample_nearest2d",
      "aten::upsample_nearest3d", "aten::_upsample_nearest_exact1d", "aten::_upsample_nearest_exact2d",
      "aten::_upsample_nearest_exact3d", "aten::upsample_linear1d", "aten::upsample_bilinear2d",
      "aten::upsample_bicubic2d", "aten::upsample_trilinear3d", "aten::_upsample_bilinear2d_aa",
      "aten::_upsample_bicubic2d_aa", "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
      "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d")  # fmt: skip
def pool(op: Op) -> None:
    """Channels stay, positions are mixed."""
    x = op.args[0]
    spatial = 3 if "3d" in op.func._schema.name else 1 if "1d" in op.func._schema.name else 2
    axes = op.axes(x)
    for axis in axes[-spatial:]:
        op.labels.freeze(axis, op.why("pooled along"))
    for out in tensors_in(op.result):
        op.give(out, [*axes[:-spatial], *[None] * spatial])


@rule("aten::embedding")
def embedding(op: Op) -> None:
    """Rows are picked by data; each row's dimensions go on."""
    weight, index = op.args[0], op.args[1]
    rows, dims = op.axes(weight)
    op.labels.freeze(rows, op.why("rows are picked by data"))
    for axis in op.axes(index):
        op.labels.freeze(axis, op.why("it picks rows"))
    data: list[Axis] = [None] * index.ndim
    op.give(op.out, [*data, dims])

"""Rules of torchvision's own operations. What picks boxes by their scores (nms) is left to freeze what it touches."""

from __future__ import annotations

from tracker.structure.axes import Axis
from tracker.structure.rules.math import contract
from tracker.structure.rules.registry import rule
from tracker.structure.trace import Op


@rule("torchvision::deform_conv2d")
def deform_conv2d(op: Op) -> None:
    """A convolution at positions that are shifted by offsets; channels of one offset group share theirs.

    Input (N, C, H, W), weight (O, C/groups, h, w), offsets (N, 2·offset groups·h·w, H', W'), and as many masks.
    """
    x, weight, offset, mask, bias = op.args[:5]
    groups, offset_groups, use_mask = op.args[11:14]
    channels, made = op.axes(x)[1], op.axes(weight)[0]
    for axis in (*op.axes(x)[2:], *op.axes(weight)[2:]):
        op.labels.freeze(axis, op.why("a filter's positions, or what it runs along"))
    for tensor in (offset, mask) if use_mask else (offset,):
        for axis in op.axes(tensor):
            op.labels.freeze(axis, op.why("positions of a filter"))
    if offset_groups > 1:
        op.labels.freeze(channels, op.why("channels share offsets in groups"))
    if groups > 1:
        for axis in (channels, made, op.axes(weight)[1]):
            op.labels.freeze(axis, op.why("grouped channels"))
    else:
        contract(op, x, 1, weight, 1)
    if bias is not None:
        made = op.labels.unify(made, op.axes(bias)[0], op.why("a bias"))
    op.give(op.out, [None, made, None, None])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(op: Op) -> None:
    """Channels stay: (N, C, H, W) and boxes → (boxes, C, h, w)."""
    channels = _of_boxes(op)
    for out in op.result if isinstance(op.result, tuple) else (op.result,):
        op.give(out, [None, channels, None, None])


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def position_sensitive_roi(op: Op) -> None:
    """Each of C channels comes from as many as a box has bins: (N, C·h·w, H, W) and boxes → (boxes, C, h, w)."""
    channels, bins = _of_boxes(op), op.out.shape[2] * op.out.shape[3]
    kept, inside = op.labels.split(channels, [op.out.shape[1], bins], op.why("channels by bins"))
    op.labels.freeze(inside, op.why("a box's bins"))
    for out in op.result:  # and which channel each number came from
        op.give(out, [None, kept, None, None])


def _of_boxes(op: Op) -> Axis:
    x, boxes = op.args[:2]
    for axis in (*op.axes(x)[2:], *op.axes(boxes)):
        op.labels.freeze(axis, op.why("positions and boxes"))
    return op.axes(x)[1]

"""What each ATen operation says about axes: a registry of small rules, open to users.

A rule reads the axes of the inputs, relates them in the algebra of labels, and says what the axes of the result are.
An operation without a rule freezes every axis that it touches: structure is never guessed.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tracker.structure.axes import Axis
from tracker.structure.rule_failures import RuleFailure
from tracker.structure.trace import Op
from tracker.utils.nested import tensors_in

Rule = Callable[[Op], None]
_RULES: dict[str, Rule] = {}
_UNFIT = (ValueError, IndexError, KeyError, TypeError, AttributeError)
log = logging.getLogger("tracker")
_SUMS = ("aten::add", "aten::add_", "aten::sub", "aten::sub_")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by names such as "aten::mm" (all overloads).

    Args:
        names: Of operations, as the trace has them.

    Examples:
        >>> @rule("mylib::scale")
        ... def scale(op):
        ...     op.give(op.out, op.axes(op.args[0]))
    """

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def apply_rule(op: Op) -> None:
    """Apply the rule of an operation: its own, that of pointwise operations, or the one for what is unknown."""
    found = _RULES.get(op.func._schema.name)
    if found is None:
        found = pointwise if _is_pointwise(op.func) else unknown
    try:
        found(op)
    except Exception as error:
        if getattr(found, "__module__", "").startswith("tracker."):
            if not isinstance(error, _UNFIT):
                raise
            unknown(op)  # called in a way that its rule does not know
        else:
            failed(op, found, error)


@functools.cache
def _is_pointwise(func: Any) -> bool:
    """Whether torch marks it so, or what it does in place: of `masked_fill_` only `masked_fill` is marked."""
    tags = list(func.tags)
    namespace, _, name = func._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
        overloads = () if packet is None else packet.overloads()
        tags += [tag for overload in overloads for tag in getattr(packet, overload).tags]
    return torch.Tag.pointwise in tags


def failed(op: Op, rule: Rule, error: Exception) -> None:
    """A user's rule raised: freeze all, and say what, where and why. The exception is kept."""
    name = op.func._schema.name
    file = getattr(getattr(rule, "__code__", None), "co_filename", "")
    frames = traceback.extract_tb(error.__traceback__)
    at = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    why = (
        f"the rule of {name} raised {type(error).__name__}: {error} "
        f"({Path(at.filename).name}:{at.lineno}: {at.line})"
    )
    if all(name != failure.operation for failure in op.trace.failures):
        log.warning("%s; all that the operation touches is frozen", why, exc_info=error)
        op.trace.failures.append(RuleFailure(name, why, error))
    for tensor in tensors_in([op.args, op.kwargs, op.result]):
        for axis in op.axes(tensor):
            op.labels.freeze(axis, op.why(why))


def unknown(op: Op) -> None:
    """Freeze everything that the operation touches."""
    for tensor in tensors_in([op.args, op.kwargs]):
        for axis in op.axes(tensor):
            op.labels.freeze(axis, op.why())


def pointwise(op: Op) -> None:
    """Broadcasting: aligned from the last dimension, axes of the full size die alike."""
    out = op.out
    inputs = tensors_in([op.args, op.kwargs])
    axes: list[Axis] = []
    for d in range(-out.ndim, 0):
        met = [op.axes(t)[d] for t in inputs if t.ndim >= -d and t.shape[d] == out.shape[d] != 1]
        axes.append(together(op, met))
    if len(inputs) > 1 and not all(map(op.is_weight, inputs)):
        for t in inputs:
            op.trace.carries |= op.parameters(t)
    if op.func._schema.name in _SUMS and not any(op.parameters(t) for t in inputs):
        for d, axis in zip(range(-out.ndim, 0), axes, strict=True):
            if sum(t.ndim >= -d and op.axes(t)[d] is not None for t in inputs) > 1:
                op.labels.mark_summed(axis, op.why("added up"))
    op.give(out, axes)


def together(op: Op, met: Sequence[Axis]) -> Axis:
    """The axis of several that die alike."""
    if not met:
        return None
    first = met[0]
    for other in met[1:]:
        first = op.labels.unify(first, other, op.why("combined with values of a fixed size"))
    return first


@rule(
    "aten::clone", "aten::detach", "aten::alias", "aten::_to_copy", "aten::contiguous",
    "aten::lift_fresh", "aten::native_dropout", "aten::bernoulli", "aten::bernoulli_", "aten::tril", "aten::tril_",
    "aten::triu", "aten::triu_", "aten::_conj", "aten::resolve_conj", "aten::nan_to_num", "aten::rand_like",
    "aten::fill_", "aten::zero_",
)  # fmt: skip
def same(op: Op) -> None:
    """The result has the axes of the first input."""
    op.give(op.out, op.axes(op.args[0]), op.origin(op.args[0]))


@rule(
    "aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones",
    "aten::new_full", "aten::new_empty",
)  # fmt: skip
def constant(op: Op) -> None:
    """Equal at every position, so any index may die."""
    op.give(op.out, [op.labels.fresh(n) if n > 1 else None for n in op.out.shape])


@rule("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
def like(op: Op) -> None:
    """As many indices as the first input has, whatever is written there later: they die alike."""
    op.give(op.out, op.axes(op.args[0]))


@rule("aten::copy_")
def copy_(op: Op) -> None:
    """The target takes on the axes of what is written into it."""
    pointwise(op)

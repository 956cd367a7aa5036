"""Integers of the model's own code that remember where they come from.

`instrumented_copy` makes a copy of a model that shares all parameters with it and in which every integer attribute
is a `TracedInt`: an int that carries an expression over attributes and sizes. `set_attributes` gives attributes new
values.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tracker.inputs.forward_pass import copy_of
from tracker.structure.adapters.registry import adapt as adapt_module
from tracker.structure.adapters.registry import can_be_adapted


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer attribute of a module, or of a configuration that a module holds."""

    module: str  # dotted path
    owner: tuple[str, ...]  # names that lead from the module to the object that has it
    name: str
    index: int | None = None  # in a tuple or a list

    def __str__(self) -> str:
        where = ".".join(("self", *self.owner, self.name))
        return where if self.index is None else f"{where}[{self.index}]"


@dataclass(frozen=True, slots=True, eq=False)
class AxisSize:
    """The labels of an axis, of which some indices may be gone."""

    axis: np.ndarray


@dataclass(frozen=True, slots=True)
class BinaryOp:
    """Two expressions and what is done with them."""

    sign: str
    left: Expr
    right: Expr


Expr = int | Attribute | AxisSize | BinaryOp

SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}

# Called with the expression of which a float is made.
listeners: list[Callable[[Expr], None]] = []


class TracedInt(int):
    """An int that knows its expression; arithmetic with integers keeps it."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> TracedInt:
        """An int of this value."""
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), BinaryOp("-", 0, self.expr))

    def __pos__(self) -> TracedInt:
        return self

    def __floor__(self) -> TracedInt:
        return self

    def __ceil__(self) -> TracedInt:
        return self

    def __trunc__(self) -> TracedInt:
        return self

    def __float__(self) -> float:
        _heard(self.expr)
        return super().__float__()

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other


def expression(value: int) -> Expr:
    """The expression of an integer."""
    return value.expr if isinstance(value, TracedInt) else operator.index(value)


def _heard(expr: Expr) -> None:
    for listener in listeners:
        listener(expr)


def _arithmetic(name: str, sign: str) -> None:
    plain, reflected = getattr(int, f"__{name}__"), getattr(int, f"__r{name}__")

    def forward(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or (sign == "**" and other < 0):
            if isinstance(other, (int, float)):
                _heard(self.expr)
            return plain(self, other)
        return TracedInt(plain(self, other), BinaryOp(sign, self.expr, expression(other)))

    def backward(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or (sign == "**" and self < 0):
            if isinstance(other, (int, float)):
                _heard(self.expr)
            return reflected(self, other)
        return TracedInt(reflected(self, other), BinaryOp(sign, expression(other), self.expr))

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", backward)


def _division() -> None:
    def forward(self: TracedInt, other: Any) -> Any:
        if isinstance(other, (int, float)):
            _heard(self.expr)
        return int.__truediv__(self, other)

    def backward(self: TracedInt, other: Any) -> Any:
        if isinstance(other, (int, float)):
            _heard(self.expr)
        return int.__rtruediv__(self, other)

    TracedInt.__truediv__, TracedInt.__rtruediv__ = forward, backward  # type: ignore[method-assign, assignment]


for _name, _sign in (
    ("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//"), ("mod", "%"), ("pow", "**")
):  # fmt: skip
    _arithmetic(_name, _sign)
_division()


def evaluate(expr: Expr, leaf: Callable[[Attribute | AxisSize], int]) -> int:
    """The value of an expression.

    Raises:
        ArithmeticError: It divides by zero.
    """
    if isinstance(expr, int):
        return expr
    if isinstance(expr, BinaryOp):
        return SIGNS[expr.sign](evaluate(expr.left, leaf), evaluate(expr.right, leaf))
    return leaf(expr)


def leaves(expr: Expr) -> Iterator[Attribute | AxisSize]:
    """Attributes and sizes in an expression."""
    if isinstance(expr, BinaryOp):
        yield from leaves(expr.left)
        yield from leaves(expr.right)
    elif not isinstance(expr, int):
        yield expr


def text(expr: Expr) -> str:
    """The expression for people."""
    if isinstance(expr, BinaryOp):
        left, right = (
            f"({text(e)})" if isinstance(e, BinaryOp) else text(e) for e in (expr.left, expr.right)
        )
        return f"{left} {expr.sign} {right}"
    return "size" if isinstance(expr, AxisSize) else str(expr)


def instrumented_copy(model: nn.Module) -> tuple[nn.Module, dict[Attribute, int]]:
    """A copy with `TracedInt`s for its integers, that has `model`'s own parameters; and the value of each attribute."""
    memo: dict[int, Any] = {id(t): t for t in model.parameters()}
    twin = copy_of(model, memo)
    own = {id(part) for part in memo.values()}  # an object may have chosen not to be copied
    values: dict[Attribute, int] = {}
    for path, module in twin.named_modules():
        adapt_module(module)
        _instrument(module, path, (), values, own)
    return twin, values


def _instrument(
    holder: object, path: str, owner: tuple[str, ...], values: dict[Attribute, int], own: set[int]
) -> None:
    own.discard(id(holder))  # once
    table = vars(holder)
    for name, value in list(table.items()):
        attribute = Attribute(path, owner, name)
        if type(value) is int:
            values[attribute] = value
            table[name] = TracedInt(value, attribute)
        elif type(value) in (tuple, list) and any(type(v) is int for v in value):
            parts = []
            for i, part in enumerate(value):
                if type(part) is int:
                    at = dataclasses.replace(attribute, index=i)
                    values[at] = part
                    part = TracedInt(part, at)
                parts.append(part)
            table[name] = type(value)(parts)
        elif is_config(name, value) and id(value) in own and len(owner) < 3:
            _instrument(value, path, (*owner, name), values, own)


def is_config(name: str, value: object) -> bool:
    """Whether a module's attribute of this name is a configuration."""
    if isinstance(value, nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return (
        hasattr(value, "to_dict")
        or dataclasses.is_dataclass(value)
        or isinstance(value, types.SimpleNamespace)
        or any(word in name.lower() for word in ("config", "cfg", "hparams", "args"))
    )


def set_attributes(model: nn.Module, attributes: Mapping[Attribute, int]) -> None:
    """Give attributes new values. Configurations are replaced by copies: other models may hold them too."""
    if any(a.owner for a in attributes):
        shared = [*model.parameters(), *model.buffers(), *model.modules()]
        memo = {id(part): part for part in shared}
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if is_config(name, value):
                    vars(module)[name] = copy.deepcopy(value, memo)
    for attribute, value in attributes.items():
        table = vars(_holder(model, attribute))
        if attribute.index is None:
            table[attribute.name] = value
        else:
            parts = list(table[attribute.name])
            parts[attribute.index] = value
            table[attribute.name] = type(table[attribute.name])(parts)


def missing_attributes(model: nn.Module, attributes: Mapping[Attribute, int]) -> list[Attribute]:
    """Attributes that the model does not have."""
    gone = []
    for attribute in attributes:
        try:
            holder = _holder(model, attribute)
        except (AttributeError, KeyError, TypeError):
            gone.append(attribute)
            continue
        if attribute.name not in vars(holder) and not (
            isinstance(holder, nn.Module) and can_be_adapted(holder)
        ):
            gone.append(attribute)
    return gone


def _holder(model: nn.Module, attribute: Attribute) -> object:
    holder: object = model.get_submodule(attribute.module)
    for name in attribute.owner:
        holder = vars(holder)[name]
    return holder

"""New values for the integers of a model's code, found before anything is touched; or the line in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tracker.structure.axes import Labels
from tracker.structure.code_sizes.int_recorder import Equation
from tracker.structure.code_sizes.traced_int import (
    Attribute,
    AxisSize,
    BinaryOp,
    Expr,
    evaluate,
    leaves,
    text,
)
from tracker.structure.trace import Trace
from tracker.structure.units import UnitGroup

Choice = Sequence[tuple[UnitGroup, Sequence[int]]]


class UnsolvableError(ValueError):
    """An integer of the model's code cannot follow a removal; the message names the line."""


@dataclass(slots=True, eq=False)
class _Fact:
    """An equation whose axes are resolved: numbers into a table of axes."""

    expr: Expr
    axis: int | None
    size: int
    equation: Equation
    attributes: frozenset[Attribute]
    axes: frozenset[int]  # of the expression and of the equation


@dataclass(slots=True)
class Integers:
    """What the model's code does with its integers, as equations over attributes and sizes of axes."""

    values: Mapping[Attribute, int] = field(default_factory=dict)  # as they are
    facts: list[_Fact] = field(default_factory=list)
    axes: list[np.ndarray] = field(default_factory=list)  # label matrices, resolved
    places: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # of parameters
    frozen: frozenset[int] = frozenset()
    labels: int = 0  # how many
    by_attribute: dict[Attribute, list[_Fact]] = field(default_factory=dict)
    _stacks: list[tuple[list[int], np.ndarray, np.ndarray]] = field(default_factory=list)

    @classmethod
    def of(
        cls, trace: Trace, values: Mapping[Attribute, int], equations: Sequence[Equation]
    ) -> Integers:
        """The equations of a trace, whose labels are final now."""
        self = cls(dict(values), frozen=frozenset(trace.labels.frozen))
        numbers: dict[tuple[object, ...], int] = {}
        seen: dict[int, int] = {}
        sizes: list[int] = []

        def number(axis: np.ndarray) -> int:
            if id(axis) not in seen:
                matrix = resolved(trace.labels, axis)
                key = (matrix.shape, matrix.tobytes())
                if key not in numbers:
                    numbers[key] = len(self.axes)
                    self.axes.append(matrix)
                    sizes.append(len(matrix))
                seen[id(axis)] = numbers[key]
            return seen[id(axis)]

        for equation in equations:
            rows = [leaf for leaf in leaves(equation.expr) if isinstance(leaf, AxisSize)]
            axis = None if equation.axis is None else number(equation.axis)
            used = {number(leaf.axis) for leaf in rows} | ({axis} - {None})
            names = frozenset(e for e in leaves(equation.expr) if isinstance(e, Attribute))
            expr = _numbered(equation.expr, number)
            fact = _Fact(expr, axis, equation.size, equation, names, frozenset(used))  # type: ignore[arg-type]
            size = len(self.axes[axis]) if axis is not None else equation.size
            now = self.value_of(expr, self.values, sizes)
            if now is None:
                continue
            if equation.note:
                fact.size = now
            elif not (now >= size if equation.or_more else now == size):
                continue  # misheard: it does not hold as things are
            self.facts.append(fact)
            for attribute in names:
                self.by_attribute.setdefault(attribute, []).append(fact)
        for name, axes in trace.parameters.items():
            for dim, each in enumerate(axes):
                if each is not None:
                    self.places[name, dim] = each
        self.places = {p: resolved(trace.labels, a) for p, a in self.places.items()}
        self.labels = 1 + max(
            (int(a.max(initial=0)) for a in (*self.axes, *self.places.values())), default=0
        )
        return self

    def solve(self, choice: Choice) -> dict[Attribute, int]:
        """New values of the attributes that have to change when these units go.

        Raises:
            UnsolvableError: There are none; the message names the integer and the line of code.
        """
        if not self.facts:
            return {}
        left = [
            len(axis) - n for axis, n in zip(self.axes, self._hit(self.dead(choice)), strict=True)
        ]
        moved = {
            i for i, (n, axis) in enumerate(zip(left, self.axes, strict=True)) if n != len(axis)
        }
        return _Solution(self, left, moved).found()

    def dead(self, choice: Choice) -> np.ndarray:
        """Of each label, whether it dies with these units."""
        dead = np.zeros(self.labels, dtype=bool)
        for group, units in choice:
            for unit in units:
                dead[self._labels_of(group.members[unit])] = True
        return dead

    def solve_growth(self, group: UnitGroup, unit: int, count: int) -> dict[Attribute, int]:
        """New values of the attributes that have to change when `count` units like this one join.

        Raises:
            UnsolvableError: There are none; the message names the integer and the line of code.
        """
        if not self.facts:
            return {}
        like = np.zeros(self.labels, dtype=bool)
        like[self._labels_of(group.members[unit])] = True
        more = [n * count for n in self._hit(like)]
        left = [len(axis) + n for axis, n in zip(self.axes, more, strict=True)]
        return _Solution(self, left, {i for i, n in enumerate(more) if n}).found()

    def _hit(self, labels: np.ndarray) -> list[int]:
        """Of each axis, how many indices have one of these labels: (labels,) bool."""
        if not self._stacks:  # axes of one width, one behind the other
            widths = sorted({axis.shape[1] for axis in self.axes if len(axis)})
            for width in widths:
                at = [i for i, a in enumerate(self.axes) if a.shape[1] == width and len(a)]
                sizes = [len(self.axes[i]) for i in at]
                starts = np.cumsum([0, *sizes[:-1]])
                self._stacks.append((at, np.concatenate([self.axes[i] for i in at]), starts))
        found = [0] * len(self.axes)
        for at, stack, starts in self._stacks:
            hit = labels[stack[:, 0]] if stack.shape[1] == 1 else labels[stack].any(axis=1)
            for i, n in zip(at, np.add.reduceat(hit, starts, dtype=np.int64).tolist(), strict=True):
                found[i] = n
        return found

    def step(self, group: UnitGroup) -> int | None:
        """The smallest number so that its multiples can go, or None."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(group.size, generator=generator).tolist()
        workable = set()
        for count in range(1, min(group.size, 257)):
            try:
                self.solve([(group, order[:count])])
            except UnsolvableError:
                continue
            workable.add(count)
        for step in range(1, group.size // 2 + 1):
            if workable.issuperset(range(step, min(group.size, 257), step)):
                return step
        return None

    def _labels_of(self, unit: Mapping[tuple[str, int], tuple[int, ...]]) -> list[int]:
        """The labels that die at exactly the indices of a unit."""
        place, indices = next(iter(unit.items()))
        candidates = set(self.places[place][indices[0]].tolist()) - {0} - self.frozen
        if len(candidates) == 1:
            return list(candidates)
        for place, indices in unit.items():
            axis = self.places[place]
            candidates = {
                c
                for c in candidates
                if np.array_equal(np.flatnonzero((axis == c).any(axis=1)), sorted(indices))
            }
        return list(candidates)

    def value_of(
        self, expr: Expr, values: Mapping[Attribute, int], left: Sequence[int]
    ) -> int | None:
        """Of an expression, by these attributes and by what is left of each axis; None where it has none."""

        def leaf(at: Attribute | AxisSize) -> int:
            if isinstance(at, Attribute):
                return values[at] if at in values else self.values[at]
            return left[int(at.axis)]

        try:
            return evaluate(expr, leaf)
        except ArithmeticError:
            return None


class _Solution:
    """One search for values."""

    def __init__(self, integers: Integers, left: Sequence[int], moved: set[int]) -> None:
        self.integers, self.left, self.moved = integers, left, moved
        self.values: dict[Attribute, int] = {}
        self.by: dict[Attribute, _Fact] = {}  # what fixed it

    def found(self) -> dict[Attribute, int]:
        touched = [f for f in self.integers.facts if f.axes & self.moved]
        for fact in touched:
            self._direct(fact)
        while True:
            changed = {a for a, v in self.values.items() if v != self.integers.values[a]}
            facts = dict.fromkeys(touched)
            for attribute in changed:
                facts.update(dict.fromkeys(self.integers.by_attribute[attribute]))
            for fact in facts:  # what a fixed attribute meets elsewhere
                self._direct(fact)
            broken = [f for f in facts if not self._holds(f)]
            if not broken:
                return {a: self.values[a] for a in sorted(changed, key=str)}
            self._guess(min(broken, key=lambda f: len(self._free(f))))

    def _target(self, fact: _Fact) -> int:
        return fact.size if fact.axis is None else self.left[fact.axis]

    def _direct(self, fact: _Fact) -> None:
        """An attribute that is a size by itself, in this line or in another."""
        for attribute in fact.attributes:
            if attribute in self.by:
                continue
            for other in self.integers.by_attribute[attribute]:
                if other.expr == attribute and not other.equation.or_more:
                    value = self._target(other)
                    if attribute not in self.by:
                        self.values[attribute], self.by[attribute] = value, other
                    elif value != self.values[attribute]:
                        self._refuse(other, self.by[attribute])

    def _holds(self, fact: _Fact, values: Mapping[Attribute, int] | None = None) -> bool:
        found = self.integers.value_of(fact.expr, values or self.values, self.left)
        target = self._target(fact)
        return found is not None and (found >= target if fact.equation.or_more else found == target)

    def _free(self, fact: _Fact) -> list[Attribute]:
        return sorted(fact.attributes - self.by.keys(), key=str)

    def _guess(self, fact: _Fact) -> None:
        """A value of an attribute that makes this and all that it alone decides true."""
        for attribute in self._free(fact):
            alone = [
                f for f in self.integers.by_attribute[attribute] if self._free(f) == [attribute]
            ]
            now = min(self.integers.values[attribute], 100_000)
            for value in (*range(now, 0, -1), *range(now + 1, 4 * now + 64)):
                trial = {**self.values, attribute: value}
                if self._holds(fact, trial) and all(self._holds(f, trial) for f in alone):
                    self.values, self.by[attribute] = trial, fact
                    return
        self._refuse(fact)

    def _refuse(self, fact: _Fact, other: _Fact | None = None) -> None:
        equation, target = fact.equation, self._target(fact)
        found = self.integers.value_of(fact.expr, self.values, self.left)
        what = text(equation.expr)
        least = "at least " if equation.or_more else ""
        if other is not None:
            raise UnsolvableError(
                f"{what} would have to be {self._target(other)} {other.equation.source}, but {target} {equation.source}"
            )
        if equation.note:
            raise UnsolvableError(
                f"{what} would become {found}, and {equation.note} {equation.source}"
            )
        now = "the number" if isinstance(equation.expr, int) else what
        raise UnsolvableError(f"{now} {found} would have to be {least}{target} {equation.source}")


def couple(labels: Labels, equations: Sequence[Equation]) -> None:
    """Axes whose sizes one attribute is, or one of which is made as large as the other, die alike, index by index.

    Of the widths of queries and of values, say, where the code has one number for both, neither could go alone; nor
    could the width of what is written into a buffer that was made with the size of something else.
    """
    first: dict[Attribute, np.ndarray] = {}
    for equation in equations:
        name, axis = equation.expr, equation.axis
        if axis is None or equation.or_more or not isinstance(name, Attribute | AxisSize):
            continue
        other = name.axis if isinstance(name, AxisSize) else first.setdefault(name, axis)
        if len(other) != len(axis):
            continue  # misheard
        pairs = zip(labels.rows(other), labels.rows(axis), strict=True)
        apart = [(x, y) for x, y in pairs if x != y]
        single = all(len(x) == len(y) == 1 for x, y in apart)
        if single and not all((x | y) & labels.frozen.keys() for x, y in apart):
            labels.unify(other, axis, f"both are {text(name)} {equation.source}")


def _numbered(expr: Expr, number: object) -> Expr:
    if isinstance(expr, BinaryOp):
        return BinaryOp(expr.sign, _numbered(expr.left, number), _numbered(expr.right, number))
    return AxisSize(np.array(number(expr.axis))) if isinstance(expr, AxisSize) else expr  # type: ignore[operator]


def resolved(labels: Labels, axis: np.ndarray) -> np.ndarray:
    """Leaf labels of each index, filled up with 0."""
    if (roots := labels.simple(axis)) is not None:
        return roots.astype(np.int32)
    return labels.sets(axis).astype(np.int32)

"""The algebra of axes: which indices of which tensors live and die together.

An *axis* is one dimension of one tensor. Each of its indices carries a set of *labels*: the index dies when any of
them does. Operations of the network relate axes: an addition makes two axes die alike (`unify`), a reshape joins or
splits them (`merge`, `split`). What cannot be expressed is frozen, with the reason.

An axis is an integer matrix (n, k): row i holds the labels of index i, 0 is no label. `None` is an axis without any
label: none of its indices can die, and nobody needs to know which they are (batch, positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

Axis = np.ndarray | None
Row = frozenset[int]


class Labels:
    """A union-find over labels in which a label may also stand for several others (it dies when any of them does)."""

    def __init__(self) -> None:
        self._count = 1  # 0 is no label
        self._parent = np.zeros(1024, dtype=np.int64)  # with room for more
        self._composite = np.zeros(1024, dtype=bool)
        # Root → the labels that it stands for, or itself.
        self._next = np.zeros((1024, 1), dtype=np.int64)
        self.frozen: dict[int, str] = {}  # root → why it can never die
        self.inexact: dict[int, str] = {}  # root → what sees that it died, other than a zero
        self.summed: dict[int, str] = {}  # root → where values of several makers are added up
        self._repeated: set[int] = set()  # of repeated values, as long as they met no others

    def fresh(self, n: int) -> np.ndarray:
        """An axis of n indices, each of which can die on its own."""
        start, self._count = self._count, self._count + n
        if self._count > len(self._parent):
            more = max(self._count, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate((self._parent, np.zeros(more, dtype=np.int64)))
            self._composite = np.concatenate((self._composite, np.zeros(more, dtype=bool)))
            self._next = np.pad(self._next, ((0, more), (0, 0)))
        new = np.arange(start, self._count)
        self._parent[new] = self._next[new, 0] = new
        return new[:, None]

    def repeated(self, n: int) -> Axis:
        """An axis along which one value is repeated: it dies like whatever it meets."""
        if n < 2:
            return None
        axis = self.fresh(n)
        self._repeated.update(axis[:, 0].tolist())
        return axis

    def unmet(self, axis: Axis) -> bool:
        """Whether values are repeated along an axis, and have met no others so far."""
        return axis is not None and self._repeated.issuperset(self.roots(axis)[:, 0].tolist())

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The representative of each label."""
        parent = self._parent
        found = parent[labels]
        while True:
            above = parent[found]
            if np.array_equal(above, found):
                result: np.ndarray = found
                return result
            found = above

    def _root(self, label: int) -> int:
        parent, root = self._parent, label
        while (above := int(parent[root])) != root:
            root = above
        return root

    def leaves(self, labels: Iterable[int]) -> Row:
        """What a set of labels comes down to: roots that stand for nothing else."""
        found: set[int] = set()
        stack = [int(label) for label in labels if label]
        while stack:
            root = self._root(stack.pop())
            if self._composite[root]:
                stack.extend(filter(None, self._next[root].tolist()))
            elif root:
                found.add(root)
        return frozenset(found)

    def simple(self, axis: np.ndarray) -> np.ndarray | None:
        """The representatives on an axis, if none of them stands for others."""
        roots = self.roots(axis)
        return None if self._composite[roots].any() else roots

    def rows(self, axis: np.ndarray) -> list[Row]:
        """The label set of each index, resolved."""
        return _rows(self.sets(axis))

    def sets(self, axis: np.ndarray) -> np.ndarray:
        """The label set of each index, resolved and in order, filled up with 0."""
        roots = self._resolved(axis)
        if roots.shape[1] == 1:
            return roots
        none = np.iinfo(np.int64).max  # behind all others
        found = np.sort(np.where(roots, roots, none), axis=1)
        found[:, 1:][found[:, 1:] == found[:, :-1]] = none
        found.sort(axis=1)
        found[found == none] = 0
        return found[:, : max(1, int((found != 0).sum(axis=1).max(initial=0)))]

    def _resolved(self, axis: np.ndarray) -> np.ndarray:
        """What the labels of each index come down to, in no order."""
        found = self.roots(axis)
        while self._composite[found].any():
            found = self.roots(self._next[found].reshape(len(found), -1))
            found = found[:, found.any(axis=0)]
        return found

    def every(self, axis: np.ndarray) -> Row:
        """All labels on an axis, resolved."""
        return frozenset(np.unique(self._resolved(axis)).tolist()) - {0}

    def freeze(self, axis: Axis, reason: str) -> None:
        """No index of this axis can die from now on."""
        if axis is not None:
            for label in self.every(axis):
                self.frozen.setdefault(label, reason)

    def mark_inexact(self, axis: Axis, reason: str) -> None:
        """Removal of an index of this axis is seen by more than consumers that read zero in its place."""
        if axis is not None:
            for label in self.every(axis):
                self.inexact.setdefault(label, reason)

    def mark_summed(self, axis: Axis, reason: str) -> None:
        """Values of several makers are added up along this axis: no maker's own value is read."""
        if axis is not None:
            for label in self.every(axis):
                self.summed.setdefault(label, reason)

    def unify(self, a: Axis, b: Axis, reason: str) -> Axis:
        """Make two axes of equal length die alike, index by index; return the axis of both."""
        if a is None or b is None:
            self.freeze(a, reason)
            self.freeze(b, reason)
            return None
        if a is b:
            return a
        if self._unify_each(a, b):
            return a
        left, right = self.sets(a), self.sets(b)
        apart = _different(left, right)
        left, right = left[apart], right[apart]
        if all(((m > 0).sum(axis=1) == 1).all() for m in (left, right)):
            for x, y in zip(left[:, 0].tolist(), right[:, 0].tolist(), strict=True):
                self._unite(x, y)
        else:
            self._unify_sets(left, right, reason)
        return a

    def _unify_each(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Unify at once, where each index has one label and none of them meets two others."""
        left, right = self.simple(a), self.simple(b)
        if left is None or right is None or not left.shape == right.shape == (len(a), 1):
            return False
        apart = left[:, 0] != right[:, 0]
        pairs = np.stack((left[apart, 0], right[apart, 0]))
        if not pairs.size:
            return True
        if not pairs.all() or len(np.unique(pairs)) < pairs.size:
            return False
        pairs.sort(axis=0)
        self._parent[pairs[1]] = pairs[0]
        self._repeated.difference_update(pairs.ravel().tolist())
        for table in (self.frozen, self.inexact, self.summed):
            if table:
                for stays, goes in pairs.T.tolist():
                    if goes in table:
                        table.setdefault(stays, table.pop(goes))
        return True

    def _unify_sets(self, a: np.ndarray, b: np.ndarray, reason: str) -> None:
        """Make sets of labels one, row by row."""
        # Two factorisations of one axis: factors that occur at the same indices are the same.
        for same, other in _equal_supports(_rows(a), _rows(b)):
            self._unite(same, other)
        a, b = self.sets(a), self.sets(b)
        apart = _different(a, b)
        a, b = a[apart], b[apart]
        for one, others in ((a, b), (b, a)):
            if _stands_for(one, others):
                self._refine(one[:, 0], others)
                return
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            left, right = self.leaves(x), self.leaves(y)
            left, right = left - right, right - left
            if not left and not right:
                continue
            if len(left) == 1 and len(right) == 1:
                self._unite(*left, *right)
            elif len(left) == 1 and right:
                self._refine(np.array([*left]), self._pack([right]))
            elif len(right) == 1 and left:
                self._refine(np.array([*right]), self._pack([left]))
            else:
                for label in left | right:
                    self.frozen.setdefault(label, reason)

    def _unite(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if self._composite[a] or self._composite[b]:
            left, right = self.leaves((a,)), self.leaves((b,))
            if left != right:
                self._unify_sets(
                    self._pack([left]), self._pack([right]), "two factorisations of one axis"
                )
            return
        if a != b:
            a, b = min(a, b), max(a, b)
            self._parent[b] = a
            self._repeated -= {a, b}
            for table in (self.frozen, self.inexact, self.summed):
                if b in table:
                    table.setdefault(a, table.pop(b))

    def _refine(self, labels: np.ndarray, parts: np.ndarray) -> None:
        """Each label stands for its row of parts from now on; both are roots that stand for nothing else."""
        wider = parts.shape[1] - self._next.shape[1]
        if wider > 0:
            self._next = np.pad(self._next, ((0, 0), (0, wider)))
        self._composite[labels] = True
        self._repeated.difference_update(labels.tolist())
        self._next[labels] = 0
        self._next[labels, : parts.shape[1]] = parts
        for table in (self.frozen, self.inexact, self.summed):
            for label, row in zip(labels.tolist(), parts.tolist(), strict=True) if table else ():
                if label in table:
                    for part in filter(None, row):
                        table.setdefault(part, table[label])

    def merge(self, sizes: Sequence[int], axes: Sequence[Axis]) -> Axis:
        """One axis over all combinations of several, the last running fastest."""
        if all(axis is None for axis in axes):
            return None
        total, columns = math.prod(sizes), []
        inner = total
        for size, axis in zip(sizes, axes, strict=True):
            inner //= size
            if axis is not None:
                block = np.repeat(axis, inner, axis=0)
                columns.append(np.tile(block, (total // len(block), 1)))
        return np.concatenate(columns, axis=1)

    def split(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """The axes whose `merge` is `axis`."""
        if axis is None or len(sizes) == 1:
            return [axis] if len(sizes) == 1 else [None] * len(sizes)
        inner = math.prod(sizes[1:])
        first, rest = self._split_in_two(axis, sizes[0], inner, reason)
        return [first, *self.split(rest, sizes[1:], reason)]

    def _split_in_two(self, axis: np.ndarray, a: int, b: int, reason: str) -> tuple[Axis, Axis]:
        if a == 1 or b == 1:
            return (None, axis) if a == 1 else (axis, None)
        rows = self.rows(axis)
        grid = [rows[i * b : (i + 1) * b] for i in range(a)]
        outer = [frozenset.intersection(*line) for line in grid]
        inner = [frozenset.intersection(*(line[j] for line in grid)) for j in range(b)]
        rest = [grid[i][j] - outer[i] - inner[j] for i in range(a) for j in range(b)]
        if any(rest):
            if frozenset().union(*rest) <= self.frozen.keys():
                return self._packed(outer), self._packed(inner)
            r, c = self.fresh(a), self.fresh(b)
            self.unify(self._pack(rest), self.merge((a, b), (r, c)), reason)
            outer = [x | y for x, y in zip(outer, self.rows(r), strict=True)]
            inner = [x | y for x, y in zip(inner, self.rows(c), strict=True)]
        return self._packed(outer), self._packed(inner)

    def _packed(self, rows: list[Row]) -> Axis:
        return self._pack(rows) if any(rows) else None

    def _pack(self, rows: list[Row]) -> np.ndarray:
        packed = np.zeros((len(rows), max(1, *map(len, rows))), dtype=np.int64)
        for i, row in enumerate(rows):
            packed[i, : len(row)] = sorted(row)
        return packed


def _rows(sets: np.ndarray) -> list[Row]:
    """A matrix of labels as sets; 0 is none."""
    return [frozenset(filter(None, row)) for row in sets.tolist()]


def _different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two matrices differ, row by row; the narrower one is filled up with 0."""
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(m, ((0, 0), (0, width - m.shape[1]))) for m in (a, b))
    result: np.ndarray = (a != b).any(axis=1).nonzero()[0]
    return result


def _stands_for(one: np.ndarray, others: np.ndarray) -> bool:
    """Whether each row on the left is one label, met nowhere else, and each on the right several."""
    return bool(
        len(one)
        and ((one > 0).sum(axis=1) == 1).all()
        and ((others > 0).sum(axis=1) > 1).all()
        and len(np.unique(one[:, 0])) == len(one)
        and not np.isin(one[:, 0], others).any()
    )


def _equal_supports(a: list[Row], b: list[Row]) -> list[tuple[int, int]]:
    """Labels of the left and of the right that occur at exactly the same indices."""
    left: dict[int, list[int]] = {}
    right: dict[int, list[int]] = {}
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        for label in x - y:
            left.setdefault(label, []).append(index)
        for label in y - x:
            right.setdefault(label, []).append(index)
    by_support = {tuple(at): label for label, at in right.items()}
    return [(label, by_support[tuple(at)]) for label, at in left.items() if tuple(at) in by_support]

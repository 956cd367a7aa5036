"""Slots of an axis as runs: short in memory and in files, however wide the axis is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tracker.utils.slotmap import SlotMap

WIDEST = 2**24  # slots of an axis, at most: a larger claim is not believed
FRESH = -1


@dataclass(frozen=True, slots=True)
class Runs:
    """(first, count) of consecutive old slots, in the order of the new ones; `first` is -1 for fresh slots.

    Examples:
        >>> Runs.of(SlotMap((0, 1, 4, None, None))).parts
        ((0, 2), (4, 1), (-1, 2))
    """

    parts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, slots: SlotMap) -> Runs:
        """The runs of a slot map."""
        parts: list[tuple[int, int]] = []
        for source in slots.source:
            s = FRESH if source is None else source
            first, count = parts[-1] if parts else (FRESH - 1, 0)
            follows = s == first + count if first >= 0 else s == FRESH
            if parts and follows and (s == FRESH) == (first == FRESH):
                parts[-1] = (first, count + 1)
            else:
                parts.append((s, 1))
        return cls(tuple(parts))

    @classmethod
    def of_plain(cls, data: Sequence[Sequence[Any]]) -> Runs:
        """The runs of plain data.

        Raises:
            ValueError: They name no slots, or more than any axis has.
        """
        parts = tuple((first, count) for first, count in data)
        for first, count in parts:
            if type(first) is not int or type(count) is not int or first < FRESH or count < 1:
                raise ValueError(f"[{first!r}, {count!r}] is no run of slots")
        runs = cls(parts)
        if max(runs.size, runs.reach) > WIDEST:
            raise ValueError("an axis of more slots than any model has")
        return runs

    @property
    def size(self) -> int:
        """Slots of the axis after the change."""
        return sum(count for _, count in self.parts)

    @property
    def reach(self) -> int:
        """Old slots that there must be, at least."""
        return max((first + count for first, count in self.parts if first != FRESH), default=0)

    def slots(self) -> SlotMap:
        """The slot map itself."""
        parts = (
            itertools.repeat(None, count) if first == FRESH else range(first, first + count)
            for first, count in self.parts
        )
        return SlotMap(tuple(itertools.chain.from_iterable(parts)))

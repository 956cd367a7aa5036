"""One noun for every change of width: where each new slot of an axis comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Where each new slot of an axis comes from; `None` is a fresh slot.

    Examples:
        >>> SlotMap((0, 2)).size            # prune: keep 0 and 2
        2
        >>> SlotMap((0, 1, None)).take(torch.tensor([5, 6]), fill=0).tolist()  # expand by one
        [5, 6, 0]
    """

    source: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """Refuse what names no slot."""
        if any(s is not None and s < 0 for s in self.source):
            raise ValueError(f"A slot map names slots from 0 upwards, not {min(self.known)}.")

    @classmethod
    def dropping(cls, size: int, gone: Iterable[int]) -> SlotMap:
        """The map that removes `gone` from an axis of `size` slots."""
        lost = set(gone)
        return cls(tuple(i for i in range(size) if i not in lost))

    @classmethod
    def appending(cls, size: int, count: int) -> SlotMap:
        """The map that adds `count` fresh slots behind an axis of `size` slots."""
        return cls((*range(size), *([None] * count)))

    def then(self, later: SlotMap) -> SlotMap:
        """Both moves as one: this, and then `later`."""
        return SlotMap(tuple(None if s is None else self.source[s] for s in later.source))

    def widened(self, count: int) -> SlotMap:
        """The same of an axis on which each slot is `count` slots in a row."""
        return SlotMap(
            tuple(None if s is None else s * count + i for s in self.source for i in range(count))
        )

    @property
    def size(self) -> int:
        """Slots of the axis after the change."""
        return len(self.source)

    @property
    def known(self) -> tuple[int, ...]:
        """The old slots that the new axis holds, in their new order."""
        return tuple(s for s in self.source if s is not None)

    def take(self, values: Tensor, fill: float, dim: int = 0) -> Tensor:
        """`values` (…, old slots, …) along `dim` → (…, new slots, …); fresh slots hold `fill`."""
        index = torch.tensor([s or 0 for s in self.source], dtype=torch.int64, device=values.device)
        taken = values.index_select(dim, index)
        fresh = [i for i, s in enumerate(self.source) if s is None]
        if fresh:
            taken.index_fill_(dim, torch.tensor(fresh, device=values.device), fill)
        return taken

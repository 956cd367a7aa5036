"""How to take a change back: the last step first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Step = Callable[[], object]


class UndoLog:
    """How to take back what was done, the last first."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Remember how to take back what is about to be done."""
        self._steps.append(step)

    def undo(self) -> None:
        """Take everything back."""
        with writable():
            while self._steps:
                self._steps.pop()()
        torch.clear_autocast_cache()


@contextmanager
def writable() -> Iterator[None]:
    """Parameters can be written inside, even when the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield

"""How to take a change back: the last step first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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


def rewrite(tensor: Tensor, new: Tensor, gradient: Tensor | None, log: UndoLog) -> None:
    """Give a parameter or buffer new content and shape in place: the one way in which any is written.

    It stays the same object, so that ties, hooks, the optimizer's groups and the graphs of earlier losses go on.
    """
    old, old_gradient = tensor.detach(), tensor.grad

    def back() -> None:
        tensor.grad = None  # its shape must fit at every moment
        tensor.set_(old)  # type: ignore[call-overload]
        tensor.grad = old_gradient

    log.add(back)
    tensor.grad = None
    tensor.set_(new)  # type: ignore[call-overload]
    tensor.grad = gradient


@contextmanager
def writable() -> Iterator[None]:
    """Parameters can be written inside, even when the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield

"""How to take a change back: the last step first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import SurgeryError
from tracker.surgery.optimizer_state.stale_steps import resized

Step = Callable[[], object]


@dataclass(slots=True)
class OriginalValues:
    """What undoing gives back, as values: for a checkpoint from which a change can still be undone.

    Of what was written several times, the first value is kept.

    Attributes:
        tensors: Tensor by id, and its content.
        states: Optimizer, parameter and its state, by the ids of both.
        groups: Group of an optimizer by id, and its parameters.
        modules: Model, name and the module that stood there (None: no module), by the model's id and the name.
    """

    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    states: dict[tuple[int, int], tuple[Any, Tensor, Any]] = field(default_factory=dict)
    groups: dict[int, tuple[Any, list[Any]]] = field(default_factory=dict)
    modules: dict[tuple[int, str], tuple[nn.Module, str, nn.Module | None]] = field(
        default_factory=dict
    )

    def follow(self, later: OriginalValues) -> None:
        """Add what was written after this."""
        for mine, theirs in (
            (self.tensors, later.tensors),
            (self.states, later.states),
            (self.groups, later.groups),
            (self.modules, later.modules),
        ):
            table: dict[Any, Any] = mine
            for key, value in theirs.items():
                table.setdefault(key, value)


class UndoLog:
    """How to take back what was done, the last first."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self.before = OriginalValues()

    def add(self, step: Step) -> None:
        """Remember how to take back what is about to be done."""
        self._steps.append(step)

    def add_last(self, step: Step) -> None:
        """Remember what is to be done once everything is taken back."""
        self._steps.insert(0, step)

    def include(self, log: UndoLog) -> None:
        """Take back what another log holds, too."""
        self.add(log.undo)
        self.before.follow(log.before)

    def undo(self) -> None:
        """Take everything back."""
        with writable():
            while self._steps:
                self._steps.pop()()
        self.before = OriginalValues()
        torch.clear_autocast_cache()


def rewrite(tensor: Tensor, new: Tensor, gradient: Tensor | None, log: UndoLog) -> None:
    """Give a parameter or buffer new content and shape in place: the one way in which any is written.

    It stays the same object, so that ties, hooks and the optimizer's groups go on. Losses of before can be kept, but
    not sent back any more.
    """
    old, old_gradient = tensor.detach(), tensor.grad

    def back() -> None:
        _refuse_earlier_graphs(tensor)
        tensor.grad = None  # its shape must fit at every moment
        _set(tensor, old)
        tensor.grad = old_gradient

    log.add(back)
    log.before.tensors.setdefault(id(tensor), (tensor, old))
    _refuse_earlier_graphs(tensor)
    tensor.grad = None
    _set(tensor, new)
    tensor.grad = gradient


def put_back(tensor: Tensor, content: Tensor) -> None:
    """Give a tensor the content that it had before a change, which is not in this process any more."""
    _refuse_earlier_graphs(tensor)
    tensor.grad = None
    _set(tensor, content)


def _set(tensor: Tensor, new: Tensor) -> None:
    if tensor.shape != new.shape:
        resized(tensor, tensor.shape)
    tensor.set_(new)  # type: ignore[call-overload]


@contextmanager
def writable() -> Iterator[None]:
    """Parameters can be written inside, even when the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _refuse_earlier_graphs(tensor: Tensor) -> None:
    """Have a backward pass through a graph of before `tensor` is rewritten raise.

    `set_` gives the parameter another accumulator; the old one lives only as long as such a graph. Where a product
    needs the weights, autograd raises by itself; elsewhere a gradient of the old shape would come without a word.
    """
    if tensor.requires_grad and tensor.is_leaf:
        with torch.inference_mode(False), torch.enable_grad():
            view = tensor.view_as(tensor).grad_fn
        accumulator = None if view is None else view.next_functions[0][0]
        if accumulator is not None:
            accumulator.register_prehook(_refuse)


def _refuse(gradients: object) -> None:
    raise SurgeryError(
        "This loss was computed before the model was changed, and its backward pass comes after it: its gradients fit "
        "weights that are no more. Change the model after optimizer.step(), or compute the loss again."
    )

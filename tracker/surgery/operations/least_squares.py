"""Least squares that are judged by rows which the fit did not see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.utils.nested import tensors_in

EVERY = 4  # one batch, sample or row of so many is held back
ENOUGH = 2  # rows for each column


@dataclass(frozen=True, slots=True)
class Fit:
    """The affine map y ≈ x · B + c that fits best, and what it leaves on rows that were held back from another fit.

    Attributes:
        matrix: B, (columns of x, columns of y) float64.
        offset: c, (columns of y,); zero where none was wanted.
        lost: Sum of squares that the fit to the other rows leaves of y on the rows held back.
        total: Sum of squares of y there, around the mean of the other rows.
        judged_on: Rows held back; 0 if there were too few to hold any back, and the fit was judged by its own rows.
        few: There were fewer than two rows for each column of x.
    """

    matrix: Tensor
    offset: Tensor
    lost: float
    total: float
    judged_on: int
    few: bool


def first_input_and_output(
    model: nn.Module, batches: Sequence[Arguments], names: Sequence[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The first tensors that modules take and give over some batches: copies, float64 on the CPU."""
    trial_copy = copy_without_hooks(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for name in names:
        taken: list[Tensor | None] = []

        # Before the module runs, which may write to its input.
        def enter(module: nn.Module, args: Any, kwargs: Any, taken: Any = taken) -> None:
            given = tensors_in((args, kwargs))
            taken.append(precise(given[0]) if given else None)

        def leave(
            module: nn.Module, args: Any, output: Any, name: str = name, taken: Any = taken
        ) -> None:
            given, made = taken.pop(), tensors_in(output)
            if given is not None and made:
                seen[name].append((given, precise(made[0])))

        trial_copy.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True)
        trial_copy.get_submodule(name).register_forward_hook(leave)
    for batch in batches:
        forward_once(trial_copy, batch)
    return seen


def precise(tensor: Tensor) -> Tensor:
    """A copy in float64 on the CPU: what is written to the tensor later does not change it."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """All rows of tensors whose last dimension is that of columns: (rows, columns)."""
    return torch.cat([t.flatten(0, -2) if t.ndim > 1 else t[None] for t in tensors])


def held_back(tensors: Sequence[Tensor]) -> Tensor:
    """Which of their rows the first fit does not see: every fourth batch or, of few, sample or row; (rows,) bool.

    Rows of one sample are alike, as the tokens of a text are: they stay together where there are enough samples.
    """
    masks = []
    for number, tensor in enumerate(tensors):
        count = math.prod(tensor.shape[:-1])
        samples = tensor.shape[0] if tensor.ndim > 1 else 1
        if len(tensors) >= EVERY:
            mask = torch.full((count,), number % EVERY == EVERY - 1)
        elif samples >= EVERY:
            mask = (torch.arange(samples) % EVERY == EVERY - 1).repeat_interleave(count // samples)
        else:
            mask = torch.arange(count) % EVERY == EVERY - 1
        masks.append(mask)
    return torch.cat(masks)


def fitted(x: Tensor, y: Tensor, held: Tensor, *, centred: bool) -> Fit:
    """The ridge fit of y to x, over all rows, judged by one that did not see those held back.

    Args:
        x: (rows, columns).
        y: (rows, outputs).
        held: Rows to hold back, (rows,) bool; see `held_back`.
        centred: Whether there is an offset.
    """
    some = ~held if bool(held.any()) and not bool(held.all()) else torch.ones_like(held)
    asked = held if bool(held.any()) and not bool(held.all()) else some
    matrix, offset = _least_squares(x[some], y[some], centred)
    lost = float((y[asked] - x[asked] @ matrix - offset).square().sum())
    total = float((y[asked] - y[some].mean(0)).square().sum())
    if asked is not some:
        matrix, offset = _least_squares(x, y, centred)
    judged_on = int(asked.sum()) if asked is not some else 0
    return Fit(matrix, offset, lost, total, judged_on, len(x) < ENOUGH * x.shape[1])


def _least_squares(x: Tensor, y: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Coefficients (in, out) and offset (out,) of the ridge fit y ≈ x·B + c."""
    mean_x = x.mean(0) if centred else torch.zeros(x.shape[1]).double()
    mean_y = y.mean(0) if centred else torch.zeros(y.shape[1]).double()
    a, b = x - mean_x, y - mean_y
    gram = a.T @ a
    ridge = 1e-4 if len(x) >= 4 * x.shape[1] else 1e-2
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    fit = torch.linalg.solve(gram, a.T @ b)
    return fit, mean_y - mean_x @ fit

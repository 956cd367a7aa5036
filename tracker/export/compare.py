"""Whether what was made of a model computes what the model computes, on the example calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tracker.engine import NeuronEngine
from tracker.errors import StructureError, VerificationError
from tracker.inputs.calls import Call
from tracker.inputs.forward_pass import forward_once
from tracker.utils.nested import tensors_in

# Of the largest output, for each number format of a model: what another order of the same sums changes.
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def current_model(engine: NeuronEngine) -> nn.Module:
    """The model that an engine speaks of."""
    return engine.tracker.current.model()


def example_calls(engine: NeuronEngine) -> tuple[Call, ...]:
    """The example calls of the engine's model.

    Raises:
        StructureError: There are none.
    """
    calls = engine.tracker.current.observer.calls
    if not calls:
        raise StructureError(
            "There are no example inputs to compare the exported model with the one in memory. Pass example_inputs to "
            "track_model, or run the model once, before exporting."
        )
    return calls


def require_equal(model: nn.Module, other: nn.Module, calls: Sequence[Call], what: str) -> float:
    """The largest relative difference of outputs, over all calls in all their modes.

    Raises:
        VerificationError: It is larger than rounding explains; `what` names the other model.
    """
    worst = 0.0
    for call in calls:
        for one in call.modes():
            expected = tensors_in(forward_once(model, one))
            try:
                found = tensors_in(forward_once(other, one))
            except StructureError as error:
                raise VerificationError(f"{what} does not run: {error}") from error
            worst = max(worst, apart(expected, found))
    require_small(worst, limit(model), what)
    return worst


def require_small(difference: float, bound: float, what: str) -> None:
    """Refuse what differs by more than `bound`.

    Raises:
        VerificationError: It does.
    """
    if not difference <= bound:
        raise VerificationError(
            f"{what} gives outputs that differ by {difference:.1e} of the largest one from those of the model in "
            f"memory, and at most {bound:.0e} is rounding. Nothing was written."
        )


def limit(model: nn.Module) -> float:
    """The relative difference that rounding explains in this model's number format."""
    kinds = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return max((CLOSE.get(kind, 0.1) for kind in kinds), default=CLOSE[torch.float32])


def apart(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor; infinite where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        difference = torch.where(same, 0.0, (a - b).abs())
        largest = float(torch.where(a.isfinite(), a.abs(), 0.0).max())
        worst = max(worst, float(difference.nan_to_num(math.inf).max()) / max(largest, 1e-30))
    return worst

"""Which check of a change catches which fault: the rows of operations, the masked model, the copy it was tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import randomise
from tracker import NeuronEngine, VerificationError
from tracker.inputs.forward_pass import arguments
from tracker.structure.code_sizes.size_equations import Integers
from tracker.structure.structure import trace_structure
from tracker.structure.trace import plain_kernels
from tracker.structure.trials.float64_mode import TOLERANCE, Precision
from tracker.structure.trials.op_stream import Stream, differing
from tracker.structure.trials.temporary_copies import InFloat64, copy_sharing_storage
from tracker.surgery import transaction


class Halves(nn.Module):
    """One layer, of which the first half is rectified, cut by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 6
        self.both, self.out = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x)
        return self.out(torch.cat((torch.relu(h[:, : self.cut]), h[:, self.cut :]), 1))


class Scaled(nn.Module):
    """Attention whose scale is made of its width at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        weights = (q @ self.k(x).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out(weights @ self.v(x))


class Wide(nn.Module):
    """An operation that only a wide layer runs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(torch.tanh(h) if h.shape[-1] > 11 else h)


FAULTS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "boundary": (Halves, "both", (4, 5)),
    "scale": (Scaled, "q", (1, 2)),
    "lost operation": (Wide, "first", (3,)),
    "columns": (lambda: Wide(32), "first", (3,)),
}
SEEN = {
    "boundary": "slice gives (4, 6) where (4, 4) is left",
    "scale": "a number in the model's code is made from theirs: mul with",
    "lost operation": "the operation tanh is missing",
    "columns": "",
}


def built(name: str) -> tuple[nn.Module, Tensor, Any, tuple[int, ...]]:
    torch.manual_seed(0)
    build, group, units = FAULTS[name]
    model = randomise(build(), 0).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64) if name != "scale" else torch.randn(2, 4, 5).double()
    structure = trace_structure(model, x, trial=False)  # the trial would refuse all of them
    return model, x, (structure[group], structure.forecast), units


@pytest.mark.parametrize("blind", [False, True], ids=["seen in the output", "hidden"])
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_caught_by_the_check_that_can_see_it(name: str, blind: bool) -> None:
    """Attributes are left as they were, and consumers get wrong columns; `blind` hides it all behind zeros."""
    model, x, (group, forecast), units = built(name)
    if blind:
        with torch.no_grad():
            model.out.weight.zero_()
    choice = [(group, units)]
    bench, inputs = InFloat64(copy_sharing_storage(model)), arguments(x)
    before, after = Stream(bench.model), Stream(bench.model)
    with plain_kernels(), torch.no_grad():
        with bench.removed(choice, {}):
            if name == "columns":
                left = [i for i in range(model.out.in_features) if i not in units]
                bench.model.out.weight = nn.Parameter(model.out.weight.detach()[:, left].flip(1))
            found = bench.run(inputs, after)
        difference = bench.difference_from_mask(inputs, choice, found, before, tolerance=TOLERANCE)
    rows = differing(before, after, forecast, choice, same=True)
    assert bool(rows) == bool(SEEN[name]), rows
    assert rows.startswith(SEEN[name])
    assert (difference > TOLERANCE) == (not blind)


@pytest.mark.parametrize("name", ["boundary", "scale"])
def test_a_fault_of_the_solver_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set, nothing tried beforehand: verification is the last that can see it, and names the line."""
    model, x, _, units = built(name)
    monkeypatch.setattr(Integers, "solve", lambda *_: {})
    monkeypatch.setattr(
        "tracker.structure.structure.try_groups", lambda _, __, groups, *___: (groups, Precision())
    )
    with torch.no_grad():
        model.out.weight.zero_()
    engine = NeuronEngine()
    engine.track_model(model, name, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(VerificationError, match=r"operations are not those of before.*test_verif"):
        engine.prune_units({FAULTS[name][1]: list(units)})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_inputs_than_the_example_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go wrong where the example inputs are zero: only other inputs show it."""
    model, x, (group, _), _ = built("columns")
    engine = NeuronEngine()
    x[:, 1:] = 0
    engine.track_model(model, "columns", x)
    real = transaction.apply

    def wrong(plan: Any, models: Any, optimizers: Any, **how: Any) -> Any:
        done = real(plan, models, optimizers, **how)
        with torch.no_grad():
            models[0].first.weight[:, 1:] += 1  # the example has zeros there
        return done

    monkeypatch.setattr(transaction, "apply", wrong)
    with pytest.raises(VerificationError, match="differs from the masked model's"):
        engine.prune_units({group.name: [3]})


def test_a_head_of_zeros_hides_nothing_from_the_trial() -> None:
    """As torchvision's vision transformer is built: any output is zero, and any removal would look right."""
    model = Wide()
    with torch.no_grad():
        model.out.weight.zero_()
    structure = trace_structure(model, torch.randn(4, 5))
    assert "differs from the masked model's" in structure["first"].reason
    assert not model.out.weight.any()


class Routed(nn.Module):
    """What its units say decides how many rows go on: with zeros in the reading weights alone, other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def rows(self, h: Tensor) -> int:
        return max(1, int((h @ h.T)[0].gt(0).sum().tolist()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.out(h[: self.rows(h)]).sum(0)


def test_rows_are_compared_with_the_masked_model_that_is_equal() -> None:
    """Units that are read by each other, too, are masked where they are made; its rows are the ones to compare."""
    gone, compared = [0, 3, 5], 0
    for seed in range(12):
        torch.manual_seed(seed)
        model, x = Routed().double().eval(), torch.randn(9, 5, dtype=torch.float64)
        h = torch.tanh(model.first(x))
        left = h.clone()
        left[:, gone] = 0
        compared += model.rows(h) != model.rows(left)
        engine = NeuronEngine()
        engine.track_model(model, "routed", x)
        assert engine.structure["first"].prunable
        assert engine.prune_units({"first": gone}).promise == "masked"
    assert compared

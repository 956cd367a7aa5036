"""Merging where nobody names the pairs: those go that are alike and cost their consumers least."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.subjects import Gated
from tracker import NeuronEngine, SurgeryError


def alike(noise: float = 0.0) -> nn.Sequential:
    """Units 7 and 4 of the first layer are (nearly) twice 2 and half of 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        for unit, of, times in ((7, 2, 2.0), (4, 5, 0.5)):
            model[0].weight[unit] = times * model[0].weight[of] + noise * torch.randn(6)
            model[0].bias[unit] = times * model[0].bias[of]
    return model


def watched(model: nn.Module, **options: Any) -> tuple[NeuronEngine, Tensor]:
    x = torch.randn(500, 6)
    engine = NeuronEngine(**options)
    engine.track_model(model, "m", x)
    return engine, x


def test_of_copies_one_goes_and_the_function_stays() -> None:
    model = alike()
    before = copy.deepcopy(model)
    engine, _ = watched(model)
    receipt = engine.merge_neurons()
    ((layer, units),) = receipt.units.items()
    assert layer == "0"
    assert {frozenset(p) & set(units) for p in ((2, 7), (4, 5))} == {frozenset([u]) for u in units}
    assert receipt.promise == "exact"
    assert engine.journal.entries[-1].operation == "merge_neurons"
    y = torch.randn(50, 6)
    assert torch.allclose(model(y), before(y), atol=1e-5)
    with pytest.raises(SurgeryError, match="No pair of neurons correlates"):
        engine.merge_neurons()
    assert model[0].out_features == 10


def test_tolerance_and_threshold_bound_what_is_folded() -> None:
    """What is folded costs the consumers no more than was asked, as measured on what they were calibrated with."""
    sizes = []
    for tolerance in (1e-9, 1e-3, 0.05, 0.3):
        model = alike(noise=0.05)
        before = copy.deepcopy(model)
        engine, x = watched(model, correlation_threshold=0.5)
        with contextlib.suppress(SurgeryError):
            engine.merge_neurons(tolerance=tolerance)
        with torch.no_grad():
            old, new = before.double()(x.double()), model.double()(x.double())
        lost = (new - old).square().sum() / (old - old.mean(0)).square().sum()
        assert float(lost) <= tolerance * (1 + 1e-4) + 1e-12
        sizes.append(model[0].out_features)
    assert sizes[0] == 12 > sizes[-1]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "much", None])
def test_a_tolerance_is_a_share(tolerance: Any) -> None:
    model = alike()
    engine, _ = watched(model)
    with pytest.raises(SurgeryError, match="tolerance is a share"):
        engine.merge_neurons(tolerance=tolerance)
    assert model[0].out_features == 12


def test_units_of_several_neurons_fold_as_one() -> None:
    """A unit of a gated MLP is a neuron of `gate` and one of `up`."""
    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        model.gate.weight[3], model.gate.bias[3] = model.gate.weight[8], model.gate.bias[8]
        model.up.weight[3], model.up.bias[3] = 2 * model.up.weight[8], 2 * model.up.bias[8]
    before = copy.deepcopy(model)
    engine, _ = watched(model)
    receipt = engine.merge_neurons()
    assert receipt.promise == "exact"
    assert len(receipt.removed_ids) == 2
    y = torch.randn(50, 6)
    assert torch.allclose(model(y), before(y), atol=1e-5)

"""Plasticity: dormant shares, effective rank and ages, against plain arithmetic on the activations themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, StatisticsError

TAUS = (0.0, 0.02, 0.1, 0.5, 1.0)


def watched(act: nn.Module, seed: int) -> tuple[NeuronEngine, nn.Sequential, Tensor]:
    """Neurons of very different activity, some of them dead; and their activations."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 24), act, nn.Linear(24, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-3, 0, 24)[:, None])
        model[0].bias.copy_(torch.linspace(-1.0, 0.3, 24))
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(4, 5))
    engine.start_tracking(enable_correlation_analysis=True)
    x = torch.randn(300, 5)
    for part in x.split(70):
        model(part)
    engine.stop_tracking()
    return engine, model, model[1](model[0](x)).detach().double()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU()])
def test_dormant_neurons_are_those_of_the_definition(act: nn.Module, seed: int) -> None:
    engine, _, h = watched(act, seed)
    one_sign = isinstance(act, nn.ReLU | nn.Sigmoid)
    size = h.abs().mean(0) if one_sign else h.square().mean(0).sqrt()
    score = size / size.mean()
    for tau in TAUS:
        told = engine.get_plasticity_summary(tau)["0"]
        clear = (score - tau).abs() > 1e-5
        dormant = {i for i in range(24) if score[i] <= tau}
        found = {engine.get_neuron_info(i)[1] for i in told["dormant_ids"]}
        assert {i for i in found ^ dormant if clear[i]} == set()
        assert told["dormant_share"] == len(found) / 24
        assert told["dormant_measure"].startswith("mean" if one_sign else "root")


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()])
def test_effective_rank_is_that_of_the_singular_values(act: nn.Module) -> None:
    engine, _, h = watched(act, 3)
    share = torch.linalg.svdvals(h)
    share = share / share.sum()
    rank = float(torch.special.entr(share).sum().exp())
    told = engine.get_plasticity_summary()["0"]["effective_rank"]
    assert told == pytest.approx(rank, rel=1e-3)
    json.dumps(engine.get_plasticity_summary())


def test_rank_is_one_of_copies_and_none_without_correlation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Identity(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[:] = model[0].weight[0]
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(4, 5))
    for correlation in (True, False):
        engine.start_tracking(enable_correlation_analysis=correlation)
        model(torch.randn(200, 5))
        engine.stop_tracking()
        rank = engine.get_plasticity_summary()["0"]["effective_rank"]
        assert rank == pytest.approx(1.0, abs=1e-3) if correlation else rank is None


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "low", True, float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: Any) -> None:
    engine, _, _ = watched(nn.ReLU(), 0)
    with pytest.raises(StatisticsError, match="dormant"):
        engine.get_plasticity_summary(threshold)

"""What recommendations foretell, against what happens."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import tracker
from tests.structure.oracle_masks import relative_difference
from tracker import NeuronEngine

SCHEMA = Path(tracker.__file__).parent / "schemas" / "optimization_recommendations.json"
X = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """A linear bottleneck, so that neurons can be sums of others, and a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 5), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.second(self.first(x))))


def prepared(model: nn.Module) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "m", X[:16])
    model.eval()
    engine.start_tracking(enable_correlation_analysis=True)
    with torch.no_grad():
        for batch in X.split(500):
            model(batch)
    engine.stop_tracking()
    return engine


def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():  # neuron 3 is the sum of 0 and 1, up to a constant: no pair shows it
        model.first.weight[3] = model.first.weight[0] + model.first.weight[1]
        model.second.bias[7], model.second.weight[7] = -9.0, 0.0  # dead
    return model


def test_a_sum_of_others_is_recommended_and_goes_without_a_trace() -> None:
    model = mixed()
    engine = prepared(model)
    advice = engine.generate_optimization_recommendations(pruning_threshold=0.0)
    jsonschema.validate(advice, json.loads(SCHEMA.read_text()))
    found = {(c["layer_name"], c["reason"]): c for c in advice["prune"]}
    explained = found["first", "explained_by_others"]
    assert explained["local_index"] in (0, 1, 3)
    assert explained["predicted_output_change"] == 0.0
    assert found["second", "dead"]["predicted_output_change"] == 0.0
    assert advice["statistics"]["total_prunable_neurons"] == len(advice["prune"])
    with torch.no_grad():
        before = model(X)
        receipt = engine.apply_recommendations(advice)
        assert set(receipt.removed_ids) >= {c["neuron_id"] for c in advice["prune"]}
        assert relative_difference(model(X), before) < 1e-5


def test_the_prediction_is_what_happens_to_the_consumers() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    engine = prepared(model)
    advice = engine.generate_optimization_recommendations(pruning_threshold=0.45)
    assert advice["prune"]
    with torch.no_grad():
        y = model(X)
        for entry in advice["prune"]:
            engine.prune_neurons([entry["neuron_id"]])
            change = (model(X) - y).square().sum() / (y - y.mean(0)).square().sum()
            engine.undo()
            assert entry["predicted_output_change"] == pytest.approx(change.sqrt().item(), rel=0.02)


def test_the_prediction_of_a_merge_is_what_folding_does() -> None:
    """One neuron takes over, not all: more is lost than if it were pruned."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[2] + 0.3 * torch.randn(6)
        model[0].bias[5] = model[0].bias[2]
    engine = prepared(model)
    advice = engine.generate_optimization_recommendations(
        pruning_threshold=0.0, redundancy_threshold=0.8
    )
    assert advice["merge"]
    with torch.no_grad():
        y = model(X)
        for entry in advice["merge"]:
            engine.merge_neurons([tuple(entry["neuron_pair"])])
            change = (model(X) - y).square().sum() / (y - y.mean(0)).square().sum()
            engine.undo()
            assert entry["predicted_output_change"] == pytest.approx(change.sqrt().item(), rel=0.02)


def test_a_stream_under_a_norm_is_not_called_explained() -> None:
    """The others explain a dimension, but the norm sees it go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[0] + model[0].weight[1]
    engine = prepared(model)
    advice = engine.generate_optimization_recommendations(pruning_threshold=0.0)
    assert not [c for c in advice["prune"] if c["reason"] == "explained_by_others"]


def test_without_correlation_nothing_is_foretold() -> None:
    model = mixed()
    engine = NeuronEngine()
    engine.track_model(model, "m", X[:16])
    engine.start_tracking()
    with torch.no_grad():
        model(X)
    advice = engine.generate_optimization_recommendations()
    assert all("predicted_output_change" not in c for c in advice["prune"])


def test_weights_that_are_not_finite_foretell_nothing() -> None:
    model = mixed()
    engine = prepared(model)
    with torch.no_grad():
        model.out.weight[0, 2] = torch.nan
    advice = engine.generate_optimization_recommendations()
    text = json.dumps(advice, allow_nan=False)
    assert "predicted_output_change" not in text or "NaN" not in text


def test_the_predicted_change_of_the_loss_is_the_one_that_comes() -> None:
    """A squared loss of a linear read-out is quadratic in what goes missing: the second order is all of it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    x = X.double()
    with torch.no_grad():
        target = model(x)  # at the minimum: nothing of first order

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (output - batch[1]).square().mean()

    engine = NeuronEngine()
    engine.track_model(model, "m", x[:16])
    engine.start_tracking(enable_correlation_analysis=True)
    model(x)
    engine.stop_tracking()
    engine.calibrate([(x, target)], loss=loss)
    advice = engine.generate_optimization_recommendations(
        pruning_threshold=0.45, redundancy_threshold=0.5
    )
    jsonschema.validate(advice, json.loads(SCHEMA.read_text()))
    assert advice["prune"]
    with torch.no_grad():
        for entry in advice["prune"]:
            engine.prune_neurons([entry["neuron_id"]])
            rise = loss(model(x), (x, target)).item()
            engine.undo()
            assert entry["predicted_loss_change"] == pytest.approx(rise, rel=0.1)

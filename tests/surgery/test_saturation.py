"""A layer is to be expanded where its consumers need all of it, whether its neurons fire always or half of the time."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tracker
from tests.surgery.subjects import apart
from tracker import NeuronEngine

SCHEMA = Path(tracker.__file__).parent / "schemas" / "optimization_recommendations.json"
OF_THE_BRIEF = {"layer_name", "current_size", "suggested_expansion", "avg_activity", "reason"}


def watched(model: nn.Module, x: Tensor) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model.eval(), "m", example_inputs=x[:8])
    engine.start_tracking(enable_correlation_analysis=True)
    with torch.no_grad():
        for batch in x.split(500):
            model(batch)
    engine.stop_tracking()
    return engine


def test_the_first_network_of_the_manual_gets_advice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    x = torch.randn(2000, 784)
    engine = watched(model, x)
    advice = engine.generate_optimization_recommendations(
        pruning_threshold=0.01, redundancy_threshold=0.9, saturation_threshold=0.95
    )
    jsonschema.validate(advice, json.loads(SCHEMA.read_text()))
    (entry,) = advice["expand"]
    assert entry.keys() >= OF_THE_BRIEF
    assert (entry["layer_name"], entry["current_size"], entry["suggested_expansion"]) == (
        "0",
        256,
        64,
    )
    assert entry["avg_activity"] < 0.6  # behind a ReLU nobody fires always
    assert advice["statistics"]["layers_needing_expansion"] == 1
    with torch.no_grad():
        before = model(x)
        engine.apply_recommendations(advice)
        assert model[0].out_features == 320
        assert apart(model(x), before) < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_least_squares_says(seed: int) -> None:
    """By hand: whether the consumers can do without any one unit."""
    torch.manual_seed(seed)
    width = 4 + seed
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    x = torch.randn(1500, 5)
    if seed % 2:
        with torch.no_grad():  # two that nearly say the same
            model[0].weight[1] = 1.02 * model[0].weight[0] + 0.02 * torch.randn(5)
            model[0].bias[1] = model[0].bias[0]
    engine = watched(model, x)
    advice = engine.generate_optimization_recommendations(0.0, 1.0, 1 - 0.5 / width)
    with torch.no_grad():
        read = model[1](model[0](x)).double().numpy()
        made = read @ model[2].weight.double().numpy().T
    read, made = read - read.mean(0), made - made.mean(0)
    errors = []
    for unit in range(width):
        rest = np.delete(read, unit, 1)
        fit = rest @ np.linalg.lstsq(rest, made, rcond=None)[0]
        errors.append(((made - fit) ** 2).sum() / (made**2).sum())
    least = min(errors)
    if abs(least / 1e-3 - 1) > 0.2:  # the solve is damped a little
        assert [c["layer_name"] for c in advice["expand"]] == (["0"] if least > 1e-3 else [])


def test_a_layer_that_always_fires_and_has_units_to_spare_is_not_expanded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].bias += 100.0  # sixteen neurons that speak of four numbers
    engine = watched(model, torch.randn(1000, 4))
    summary = engine.get_layer_summary()["0"]
    assert summary["avg_firing_frequency"] > 0.99
    advice = engine.generate_optimization_recommendations(0.0, 1.0)
    assert advice["expand"] == []
    assert len(advice["prune"]) >= 11


def test_after_calibration_the_gain_is_told_and_the_larger_comes_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)
    )  # fmt: skip
    x, y = torch.randn(2000, 8), torch.randint(0, 4, (2000,))
    engine = watched(model, x)
    engine.calibrate(
        list(zip(x.split(100), y.split(100), strict=True)),
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
    )
    advice = engine.generate_optimization_recommendations(0.0, 1.0, 0.75)
    jsonschema.validate(advice, json.loads(SCHEMA.read_text()))
    gains = [c["predicted_gain"] for c in advice["expand"]]
    assert len(gains) >= 2
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > 0


def test_without_correlation_a_note_says_that_only_firing_tells() -> None:
    torch.manual_seed(0)
    model, engine = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), NeuronEngine()
    engine.track_model(model, "m")
    engine.start_tracking()
    model(torch.randn(200, 4))
    engine.stop_tracking()
    notes = engine.generate_optimization_recommendations()["metadata"]["notes"]
    assert any("of growth only firing tells" in note for note in notes)

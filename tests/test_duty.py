"""Windows that observe some passes, or some layers, only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, NotTrackedError, StatisticsError


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def engine() -> NeuronEngine:
    engine = NeuronEngine(observe="output")
    engine.model = mlp()
    engine.track_model(engine.model, "model", torch.randn(2, 6))
    return engine


def test_every_third_pass_the_first_one_first(engine: NeuronEngine) -> None:
    """What was observed equals an engine that saw those passes alone; samples count what was observed."""
    batches = torch.randn(7, 5, 6)
    engine.start_tracking(every=3)
    for batch in batches:
        engine.model.train()(batch)
    some = engine.get_neuron_stats(0)
    engine.start_tracking()
    for batch in batches[::3]:
        engine.model(batch)
    assert engine.get_neuron_stats(0) == some
    assert some["observations"] == some["total_samples"] == 15


def test_the_modes_take_their_own_turns(engine: NeuronEngine) -> None:
    """Training and evaluation in alternation: half of each is seen."""
    engine.start_tracking(every=2, mode="all")
    for _ in range(4):
        engine.model.train()(torch.randn(3, 6))
        engine.model.eval()(torch.randn(100, 6))
    assert engine.get_neuron_stats(0)["observations"] == 206


def test_a_fresh_window_begins_with_its_first_pass(engine: NeuronEngine) -> None:
    for _ in range(2):
        engine.start_tracking(every=4)
        engine.model(torch.randn(9, 6))
        assert engine.get_neuron_stats(0)["observations"] == 9


@pytest.mark.parametrize("every", [0, -1])
def test_a_turn_that_never_comes_is_refused(engine: NeuronEngine, every: int) -> None:
    with pytest.raises(StatisticsError, match="every"):
        engine.start_tracking(every=every)


def test_every_in_a_compiled_model() -> None:
    engine, model = NeuronEngine(), mlp()
    engine.track_model(model, "model", torch.randn(2, 6))
    engine.start_tracking(every=2)
    compiled = torch.compile(model, backend="eager")
    for _ in range(5):
        compiled(torch.randn(4, 6))
    assert engine.get_neuron_stats(0)["observations"] == 12
    torch._dynamo.reset()


@pytest.mark.parametrize("observe", ["reads", "output"])
def test_chosen_layers_alone(observe: str) -> None:
    """The others say why they show nothing; the next window has all again."""
    engine, model = NeuronEngine(observe=observe), mlp()
    ids = engine.track_model(model, "model", torch.randn(2, 6))
    engine.start_tracking(layers=["2"])
    model(torch.randn(5, 6))
    assert engine.get_neuron_stats(ids["2"][0])["observations"] == 5
    assert engine.get_neuron_stats(ids["0"][0])["observations"] == 0
    assert "not chosen" in engine.get_layer_summary()["0"]["problem"]
    assert "0" not in engine.get_dead_neurons()
    engine.start_tracking()
    model(torch.randn(5, 6))
    assert engine.get_neuron_stats(ids["0"][0])["observations"] == 5


def test_an_unknown_layer_is_refused_and_nothing_begins(engine: NeuronEngine) -> None:
    engine.start_tracking(layers="0")
    engine.model(torch.randn(5, 6))
    with pytest.raises(NotTrackedError, match="first"):
        engine.start_tracking(layers=["first"])
    engine.model(torch.randn(5, 6))
    assert engine.get_neuron_stats(0)["observations"] == 10


def test_a_layer_chosen_without_its_leader() -> None:
    """A norm and the layer before it are read at one place; each can be had without the other."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    engine = NeuronEngine()
    ids = engine.track_model(model, "model", torch.randn(2, 1, 8, 8))
    engine.start_tracking(layers=["1"])
    model(torch.randn(2, 1, 8, 8))
    assert engine.get_neuron_stats(ids["1"][0])["observations"] == 72
    assert engine.get_neuron_stats(ids["0"][0])["observations"] == 0


def test_a_checkpoint_keeps_the_turns_and_the_choice(tmp_path: Path) -> None:
    engine, model = NeuronEngine(), mlp()
    ids = engine.track_model(model, "model", torch.randn(2, 6))
    engine.start_tracking(every=3, layers=["0"])
    engine.save_checkpoint(tmp_path / "run")
    again = mlp()
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", again)
    for _ in range(4):
        again(torch.randn(5, 6))
    assert resumed.get_neuron_stats(ids["0"][0])["observations"] == 10
    assert resumed.get_neuron_stats(ids["2"][0])["observations"] == 0

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


def comoments(engine: NeuronEngine, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    covariance = engine.tracker.observe().layers[layer].covariance
    return covariance.count, covariance.comoment


@pytest.mark.parametrize("rows", [600, 515, 24, 21, 5, 1])
def test_a_sample_of_rows_leaves_none_out_for_ever(rows: int) -> None:
    """As many passes over the same rows as there are turns: together each row once."""
    model, x = mlp(), torch.randn(rows, 6)
    engine = NeuronEngine(observe="output")
    engine.track_model(model, "model", x)
    engine.start_tracking(enable_correlation_analysis=True)
    model(x)
    whole, everything = comoments(engine), engine.get_neuron_stats(3)
    engine.start_tracking(enable_correlation_analysis=True, correlation_every=8)
    for _ in range(8):
        model(x)
    count, comoment = comoments(engine)
    assert torch.equal(count, whole[0])
    assert torch.allclose(comoment, whole[1], atol=1e-6)
    assert engine.get_neuron_stats(3)["observations"] == 8 * everything["observations"]


def test_of_maps_samples_or_positions_are_taken() -> None:
    conv = nn.Conv2d(2, 5, 3)
    engine = NeuronEngine(observe="output")
    for shape, taken in (((16, 2, 7, 7), 4 * 25), ((2, 2, 22, 22), 2 * 100), ((1, 2, 3, 4), 2)):
        engine.track_model(conv, "conv", torch.randn(shape))
        engine.start_tracking(enable_correlation_analysis=True, correlation_every=4)
        conv(torch.randn(shape))
        assert comoments(engine)[0].unique().tolist() == [taken]


def test_batches_that_come_in_the_rhythm_of_the_sample_are_all_seen() -> None:
    """Small ones are taken whole, one of eight; and were it always the first of eight, seven were never seen."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    engine = NeuronEngine(observe="output")
    batches = torch.zeros(6, 20, 6)
    for i in range(6):
        batches[i, :, i] = torch.randn(20)  # each moves one neuron
    engine.track_model(model, "model", batches[0])
    engine.start_tracking(enable_correlation_analysis=True, correlation_every=6)
    for _ in range(40):
        for batch in batches:
            model(batch)
    assert bool((comoments(engine)[1].diagonal() > 0).all())
    assert comoments(engine)[0].unique().tolist() == [40 * 20]


def test_correlations_of_a_sample_lie_within_their_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model, batches = mlp(), [torch.randn(256, 6) for _ in range(32)]
    engine = NeuronEngine(observe="output")
    engine.track_model(model, "model", batches[0])
    found = []
    for sampling in (1, 8):
        engine.start_tracking(enable_correlation_analysis=True, correlation_every=sampling)
        for batch in batches:
            model(batch)
        found.append(engine.tracker.observe().layers[0].covariance.correlation())
    error = (1 - found[0].square()) / (32 * 32 - 1) ** 0.5
    assert bool(((found[1] - found[0]).abs() <= 5 * error + 1e-9).all())
    assert not torch.equal(found[0], found[1])
    engine.print_correlation_analysis()
    printed = capsys.readouterr().out
    assert "12.5% of the observations, 1,024 at least" in printed
    assert "standard error of 0.006" in printed


def test_a_sample_proves_nothing_exact() -> None:
    """A neuron that fires in rows that were left out is not constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, -1
        model[0].weight[2, 0] = 1
    x = torch.randn(400, 6)
    x[::2, 0], x[1::2, 0] = -5, 5
    engine = NeuronEngine()
    engine.track_model(model, "model", x[:40])
    engine.start_tracking(enable_correlation_analysis=True, correlation_every=2)
    model(x)
    receipt = engine.prune_neurons({"0": [2]}, dry_run=True)
    assert receipt.promise == "changed"


def test_a_sample_of_nothing_is_refused(engine: NeuronEngine) -> None:
    with pytest.raises(StatisticsError, match="correlation_every"):
        engine.start_tracking(enable_correlation_analysis=True, correlation_every=0)


def test_sampling_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model, batches = mlp(), torch.randn(6, 16, 6)
    engine = NeuronEngine()
    engine.track_model(model, "model", batches[0])
    engine.start_tracking(enable_correlation_analysis=True, correlation_every=4)
    for batch in batches[:3]:
        model(batch)
    engine.save_checkpoint(tmp_path / "saved")
    again = NeuronEngine.load_checkpoint(tmp_path / "saved", other := mlp())
    for batch in batches[3:]:
        model(batch), other(batch)
    ours, theirs = comoments(engine), comoments(again)
    assert torch.equal(ours[0], theirs[0])
    assert torch.allclose(ours[1], theirs[1])

"""The parts of an engine: each works by itself, and the facade only passes its calls on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine
from tracker.analyzer import Analyzer
from tracker.parts.calibrator import Calibrator
from tracker.parts.changer import Changer
from tracker.parts.compressor import Compressor
from tracker.parts.sessions import Sessions
from tracker.parts.surgeon import Surgeon
from tracker.reporter import Reporter
from tracker.tracker import ActivationTracker
from tracker.training import Policy
from tracker.training.trainer import Trainer

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


@pytest.fixture
def tracker() -> ActivationTracker:
    tracker = ActivationTracker(0.01)
    model = net()
    tracker.track(model, "m", X)
    tracker.kept = model  # type: ignore[attr-defined]  # an engine keeps no model alive
    return tracker


def test_an_analyzer_needs_what_observes_and_nothing_else(tracker: ActivationTracker) -> None:
    analyzer = Analyzer(tracker)
    tracker.hook()
    tracker.start()
    model = tracker.current.model()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -1.0  # type: ignore[index]
        model(X)
    assert 3 in analyzer.get_dead_neurons()["0"]
    told: list[Any] = []
    reporter = Reporter(analyzer, Sessions(tracker, 0.01), lambda seen, advice: told.append(advice))
    advice = reporter.generate_optimization_recommendations()
    assert told == [advice]
    assert 3 in [c["neuron_id"] for c in advice["prune"]]


def test_a_surgeon_and_a_compressor_change_a_model_without_the_facade(
    tracker: ActivationTracker,
) -> None:
    sessions = Sessions(tracker, 0.01)
    changer = Changer(tracker, sessions)
    calibrator = Calibrator(tracker, sessions, changer)
    surgeon = Surgeon(tracker, changer, calibrator, Analyzer(tracker))
    model: Any = tracker.current.model()
    expected = model(X).detach()
    surgeon.expand_layer("0", 2)
    assert model[0].out_features == 14
    assert torch.allclose(model(X), expected, atol=1e-6)
    calibrator.calibrate([X])
    before = changer.count_parameters()
    Compressor(tracker, sessions, changer, calibrator).compress(0.7, progress=False)
    assert changer.count_parameters() < before
    trainer = Trainer(tracker, sessions, surgeon)
    trainer.start_self_modification(Policy(warm_up=0, every=4, look=2, settle=2))
    for _ in range(6):
        model(X)
        trainer.step(1.0)
    assert len(trainer.life) > 1


def test_every_call_of_the_facade_is_that_of_a_part() -> None:
    """With its signature and its docstring; a part that is put in another's place answers."""
    engine, calls = NeuronEngine(), 0
    for name, function in vars(NeuronEngine).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        calls += 1
        part = [p for p in vars(engine).values() if name in vars(type(p))]
        part = [p for p in part if getattr(type(p), name).__doc__ == function.__doc__]
        assert len(part) == 1, name
        own = getattr(type(part[0]), name)
        assert inspect.signature(function) == inspect.signature(own), name
        assert function.__doc__ == own.__doc__, name
        assert function.__doc__, name
    assert calls > 50

    class Silent(Trainer):
        def step(self, loss: Any, *, model: nn.Module | None = None) -> None:
            return None

    engine.trainer = Silent(engine.tracker, engine.sessions, engine.surgeon)
    assert engine.step("nothing that the other would take") is None


def test_an_engine_says_what_it_is() -> None:
    engine, model = NeuronEngine(), net()
    assert repr(engine) == "NeuronEngine: no model is tracked"
    engine.track_model(model, "mine\n", X)
    engine.prune_neurons({"0": [1]})
    engine.start_tracking()
    model(X)
    assert repr(engine) == (
        "NeuronEngine: 'mine\\\\n', a Sequential of 204 parameters; 23 neurons in 3 layers; "
        "64 samples observed; 1 change"
    )

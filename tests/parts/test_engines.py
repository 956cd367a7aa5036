"""Several engines on one model, and code that is none: all know what the model is, or say that they do not."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.parts.test_sessions import CHANGES, X, net, same, state, watched
from tracker import NeuronEngine, Policy
from tracker.errors import TrackerError


def tagged() -> nn.Sequential:
    """The bias of each neuron of the first layer tells which one it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.arange(1.0, 13.0))
    return model


def means(engine: NeuronEngine) -> dict[int, float]:
    ids = engine.tracker.current.layers["0"].ids
    return {i: engine.get_neuron_stats(i)["mean"] for i in ids}


def test_engines_on_one_model_change_together(tmp_path: Path) -> None:
    model = tagged()
    one, two = watched(model), watched(model)
    optimizer, ema = torch.optim.Adam(model.parameters()), copy.deepcopy(model)
    two.attach_optimizer(optimizer)
    two.attach_follower(ema)
    model(X).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.arange(1.0, 13.0))
    assert means(two) == {i: i + 1.0 for i in range(12)}
    one.prune_neurons([0, 3], compensate=False)
    two.prune_neurons([5], compensate=False)
    one.prune_neurons([7], compensate=False)
    left = [1, 2, 4, 6, 8, 9, 10, 11]
    assert model[0].bias.tolist() == [i + 1.0 for i in left]
    assert means(one) == means(two) == {i: i + 1.0 for i in left}
    assert [e.operation for e in one.journal] == [e.operation for e in two.journal]
    assert len(ema[0].bias) == len(optimizer.state[model[0].bias]["exp_avg"]) == 8
    for engine in (one, two):
        with pytest.raises(TrackerError, match="has left"):
            engine.get_neuron_info(5)
    one.expand_layer("0", 2)
    before = [two.tracker.current.layers["0"].ids[-2:], list(two.tracker.current.layers["0"].ids)]
    back = two.undo()  # the model's last change, whoever made it
    assert back.removed_ids == before[0]
    assert model[0].bias.tolist() == [i + 1.0 for i in left]
    with pytest.raises(TrackerError, match="no change to undo"):
        one.undo()
    two.insert_layer("2")
    one.start_tracking()
    model(X)
    one.stop_tracking()
    assert set(one.get_layer_summary()) == set(two.tracker.current.layers)
    for number, engine in enumerate((one, two)):
        engine.save_checkpoint(tmp_path / str(number))
        fresh = tagged()
        NeuronEngine.load_checkpoint(tmp_path / str(number), fresh)
        assert same(state(fresh), state(model))


@pytest.mark.parametrize("name", CHANGES)
def test_what_other_code_changed_is_refused(name: str) -> None:
    model = net()
    engine = watched(model)
    advice = engine.generate_optimization_recommendations()
    engine.expand_layer("3", 1)
    keep = [i for i in range(16) if i != 2]
    for module in (model[0], model[1]):
        for key in ("weight", "bias"):
            setattr(module, key, nn.Parameter(getattr(module, key).detach()[keep]))
    model[1].running_mean, model[1].running_var = (
        t[keep] for t in (model[1].running_mean, model[1].running_var)
    )
    model[3].weight = nn.Parameter(model[3].weight.detach()[:, keep])
    model[0].out_features = model[1].num_features = model[3].in_features = 15
    before = state(model)
    calls: list[Any] = [CHANGES[name], NeuronEngine.undo]
    if name == "apply_recommendations":
        calls[0] = lambda e: e.apply_recommendations(advice)
    for call in calls:
        with pytest.raises(TrackerError, match="was changed since"):
            call(engine)
        assert same(state(model), before)
    with pytest.raises(TrackerError, match="was changed since"):
        _ = engine.structure
    fresh = watched(model)
    fresh.prune_neurons({"0": [0]}, compensate=False)
    model(X).sum().backward()


@pytest.mark.parametrize(
    "what", ["track", "window", "change", "composite", "calibrate", "attached", "run", "undo"]
)
def test_an_engine_keeps_no_model_alive(what: str) -> None:
    model: Any = net()
    engine = watched(model)
    if what == "change":
        engine.prune_neurons({"3": [0]})
    elif what == "composite":
        engine.expand_layers({"0": 2, "3": 1})
    elif what == "calibrate":
        engine.calibrate([X])
    elif what == "attached":
        optimizer = torch.optim.Adam(model.parameters())
        engine.attach_optimizer(optimizer)
        engine.attach_follower(copy.deepcopy(model))
    elif what == "undo":
        engine.insert_layer("3")
        engine.undo()
    elif what == "run":
        engine.start_self_modification(
            Policy(warm_up=0, every=4, look=2, settle=2, tolerance=10.0, regret=1e9)
        )
        for _ in range(5):
            model(X)
            engine.step(1.0)
        assert engine.journal
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert engine.get_layer_summary()

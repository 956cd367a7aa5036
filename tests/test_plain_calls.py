"""What one call returns the next one understands; plain mistakes are refused in our own words, and touch nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tracker import NeuronEngine
from tracker.errors import TrackerError, UnknownNeuronError


def network(widths: tuple[int, ...] = (6, 9, 7, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tracked(model: nn.Module, x: Tensor) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    return engine


@settings(deadline=None, max_examples=15)
@given(
    first=st.integers(2, 12),
    second=st.integers(13, 30),
    data=st.data(),
    keep_type=st.sampled_from([list, sorted, lambda ids: [i for i in ids if i >= 0]]),
)
def test_dead_neurons_as_they_are_told_are_those_that_go(
    first: int, second: int, data: st.DataObject, keep_type: Callable[[Any], list[int]]
) -> None:
    model = network((5, first, second, 3))
    silent = data.draw(st.sets(st.integers(0, second - 1), min_size=1, max_size=second - 1))
    layer: Any = model[2]
    with torch.no_grad():
        for i in silent:
            layer.weight[i], layer.bias[i] = 0.0, -1.0 - i
    marks = layer.bias.detach().clone()
    x = torch.randn(64, 5)
    engine = tracked(model, x)
    engine.start_tracking()
    model(x)
    dead = engine.get_dead_neurons()
    assume(len(dead["2"]) < second)  # those of random weights may be silent by themselves
    asked = {n: keep_type(ids) for n, ids in dead.items() if n == "2"}
    engine.prune_neurons(asked, compensate=False)
    told = {i - first for i in dead["2"]}  # ids count up over the layers
    assert silent <= told
    left = model[2].bias.tolist()
    assert left == [marks[i].item() for i in range(second) if i not in told]


def test_an_id_under_another_layer_is_refused() -> None:
    x = torch.randn(8, 6)
    model = network()
    engine = tracked(model, x)
    ids = engine.track_model(model)
    with pytest.raises(UnknownNeuronError, match="belongs to layer"):
        engine.prune_neurons({"2": ids["0"][:1]})


def test_tables_that_were_returned_are_the_callers_own() -> None:
    x = torch.randn(8, 6)
    model = network()
    engine = tracked(model, x)
    ids = engine.track_model(model)
    before = {n: list(v) for n, v in ids.items()}
    ids["0"].sort(reverse=True)
    ids["2"].clear()
    del ids["4"]
    assert engine.track_model(model) == before
    assert engine.get_neuron_info(before["0"][0]) == ("0", 0)
    kept = engine.track_model(model)
    engine.prune_neurons({"0": [0]}, compensate=False)
    assert kept == before


MISTAKES: dict[str, Callable[[NeuronEngine], object]] = {
    "a number for a list": lambda e: e.prune_neurons({"0": 3}),  # type: ignore[dict-item]
    "a module": lambda e: e.prune_neurons(nn.Linear(2, 2)),  # type: ignore[arg-type]
    "a number": lambda e: e.prune_neurons(3),  # type: ignore[arg-type]
    "a name": lambda e: e.prune_neurons("0"),  # type: ignore[arg-type]
    "a name in a list": lambda e: e.prune_neurons(["0"]),  # type: ignore[list-item]
    "a fraction": lambda e: e.prune_neurons({"0": [0.5]}),  # type: ignore[list-item]
    "a negative index": lambda e: e.prune_neurons({"0": [-1]}),
    "an unknown layer": lambda e: e.recycle_neurons({"typo": [0]}),
    "nothing": lambda e: e.prune_neurons(None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_plain_mistakes_are_refused_and_touch_nothing(mistake: str) -> None:
    x = torch.randn(8, 6)
    model = network()
    engine = tracked(model, x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = engine.track_model(model)
    with pytest.raises(TrackerError):
        MISTAKES[mistake](engine)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert engine.track_model(model) == ids
    assert len(engine.journal) == 0


def test_example_inputs_at_any_time() -> None:
    model = network()
    engine = NeuronEngine()
    engine.track_model(model, "m")
    engine.track_model(model, "m", example_inputs=torch.randn(8, 6))
    assert engine.structure.groups
    with pytest.raises(TrackerError):
        engine.track_model(model, "m", example_inputs=torch.randn(8, 5))
    assert engine.structure.groups  # what did not fit was not taken
    assert engine.prune_neurons({"0": [0]}).removed_ids == [0]


def test_a_step_without_a_run_is_none() -> None:
    assert NeuronEngine().step(1.0) is None


def test_ids_are_saved_and_loaded_as_data(tmp_path: Path) -> None:
    ids = tracked(network(), torch.randn(8, 6)).track_model(network())
    torch.save(ids, tmp_path / "ids.pt")
    assert torch.load(tmp_path / "ids.pt", weights_only=True) == ids
    assert json.loads(json.dumps(ids)) == ids

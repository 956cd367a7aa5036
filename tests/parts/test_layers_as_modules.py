"""Every call that takes a layer's name takes the layer itself, and does the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, NotTrackedError, Policy, SurgeryError

Named = Callable[[str], Any]  # a name, as itself or as the module that bears it

CALLS: dict[str, Callable[[NeuronEngine, Named], Any]] = {
    "track_model.axes": lambda e, n: e.track_model(fresh(n), "2", axes={n("0"): -1}),
    "track_model.assume_unread": lambda e, n: e.track_model(fresh(n), "2", assume_unread=[n("4")]),
    "start_tracking.layers": lambda e, n: (e.start_tracking(layers=n("0")), ran(e)),
    "plot_correlation_matrix.layer_name": lambda e, n: bool(e.plot_correlation_matrix(n("0"))),
    "prune_units.units": lambda e, n: e.prune_units({n("0"): [1]}),
    "prune_units.protect": lambda e, n: e.prune_units({"0": [1], "2": [0]}, protect=[n("2"), 3]),
    "prune_neurons.neurons": lambda e, n: e.prune_neurons({n("0"): [1], n("2"): [0]}),
    "prune_neurons.protect": lambda e, n: e.prune_neurons([1, 2, 9], protect={n("0"): 0.9}),
    "expand_layer.layer_name": lambda e, n: e.expand_layer(n("0"), 2),
    "expand_layers.counts": lambda e, n: e.expand_layers({n("0"): 2, n("2"): 1}),
    "expand_layers.directions": lambda e, n: e.expand_layers(
        {n("0"): 1}, directions={n("0"): torch.ones(1, 4)}
    ),
    "recycle_neurons.neurons": lambda e, n: e.recycle_neurons({n("0"): [1]}),
    "recycle_neurons.neuron_ids": lambda e, n: e.recycle_neurons(neuron_ids={n("0"): [1]}),
    "compress.floor": lambda e, n: e.compress(keep=0.7, floor={n("2"): 6}),
    "compress.protect": lambda e, n: e.compress(keep=0.7, rounds=2, protect=n("2")),
    "insert_layer.after": lambda e, n: e.insert_layer(n("0")),
    "remove_layer.layer_name": lambda e, n: e.remove_layer(layer_name=n("2"), force=True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def fresh(named: Named) -> nn.Module:
    """Another model, of which `named` speaks from now on."""
    named.model = net()  # type: ignore[attr-defined]
    return named.model  # type: ignore[attr-defined, no-any-return]


def ran(engine: NeuronEngine) -> Any:
    engine.tracker.current.model()(torch.ones(5, 4))
    return engine.get_dataset_statistics()


def outcome(call: str, by_module: bool) -> tuple[Any, Any]:
    model = net()
    engine = NeuronEngine()
    engine.track_model(model, "net", example_inputs=torch.randn(32, 4))
    engine.start_tracking(enable_correlation_analysis=True)
    model(torch.randn(32, 4))
    engine.stop_tracking()

    def named(name: str) -> Any:
        return named.model.get_submodule(name) if by_module else name  # type: ignore[attr-defined]

    named.model = model  # type: ignore[attr-defined]
    told = CALLS[call](engine, named)
    found = told.to_dict() if hasattr(told, "to_dict") else told
    return repr(found), {k: v.tolist() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("call", CALLS)
def test_a_module_means_its_name(call: str) -> None:
    assert outcome(call, by_module=True) == outcome(call, by_module=False)


def test_no_call_that_takes_layers_is_left_out() -> None:
    takes = re.compile("LayerOrName|ByLayer|Protected|Neurons")
    names = [n for n in vars(NeuronEngine) if not n.startswith("_")]
    found = {
        f"{name}.{parameter.name}"
        for name in names
        if callable(getattr(NeuronEngine, name))
        for parameter in inspect.signature(getattr(NeuronEngine, name)).parameters.values()
        if takes.search(str(parameter.annotation)) or "layer" in parameter.name
    }
    assert found == set(CALLS)


@pytest.mark.parametrize("call", [c for c in CALLS if not c.startswith("track_model")])
def test_a_module_of_another_model_is_refused(call: str) -> None:
    model, other = net(), net()
    engine = NeuronEngine()
    engine.track_model(model, "net", example_inputs=torch.randn(32, 4))
    engine.start_tracking(enable_correlation_analysis=True)
    model(torch.randn(32, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        NotTrackedError, match=r"Linear is no module of the tracked Sequential.*'0'"
    ):
        CALLS[call](engine, other.get_submodule)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not len(engine.journal)


def test_a_container_is_one_module_and_a_name_is_no_pattern() -> None:
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    model = nn.ModuleDict({"a*": inner, "ab": nn.Linear(6, 5), "end": nn.Linear(5, 2)})
    whole = nn.Sequential(model["a*"], nn.ReLU(), model["ab"], nn.ReLU(), model["end"])
    whole.add_module("0*", nn.Identity())
    engine = NeuronEngine()
    engine.track_model(whole, "nested", example_inputs=torch.randn(32, 4))
    engine.compress(keep=0.8, protect=[inner])
    assert (inner[0].out_features, inner[2].out_features) == (8, 6)
    with pytest.raises(SurgeryError, match="Nothing is named"):
        engine.compress(keep=0.8, protect=["0\\*"])
    assert engine.compress(keep=0.9, protect=[whole[5]]).parameters_after  # no unit, and no error


def test_named_twice_is_an_error() -> None:
    model = net()
    engine = NeuronEngine()
    engine.track_model(model, "net", example_inputs=torch.randn(32, 4))
    with pytest.raises(NotTrackedError, match="'0' is there twice"):
        engine.expand_layers({"0": 1, model[0]: 2})


def test_a_policy_takes_names_and_says_so() -> None:
    with pytest.raises(SurgeryError, match="A policy is plain data"):
        Policy(protect=[net()[0]])  # type: ignore[list-item]

"""What a public call returns is the caller's: what he does to it, the engine does not see, and it does not change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping, MutableSequence, MutableSet
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, Policy, StatisticsError
from tracker.surgery import Receipt

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[NeuronEngine], Any]] = {
    "track_model": lambda e: e.track_model(e.kept, "m"),
    "get_neuron_info": lambda e: e.get_neuron_info(1),
    "get_summary": lambda e: e.get_summary(),
    "get_neuron_stats": lambda e: e.get_neuron_stats(1),
    "get_dataset_statistics": lambda e: e.get_dataset_statistics(),
    "get_layer_summary": lambda e: e.get_layer_summary(),
    "get_dead_neurons": lambda e: e.get_dead_neurons(),
    "find_redundant_neurons": lambda e: e.find_redundant_neurons(0.0),
    "get_redundancy_summary": lambda e: e.get_redundancy_summary(0.0),
    "get_explained_shares": lambda e: e.get_explained_shares(),
    "recommendations": lambda e: _undated(e.generate_optimization_recommendations()),
    "groups": lambda e: e.structure.groups,
    "frozen": lambda e: e.structure.frozen,
    "roles": lambda e: [g.roles for g in e.structure.groups],
    "read points": lambda e: e.structure.read_points,
    "slices": lambda e: e.structure.groups[0].slices([0, 1]),
    "count_parameters": lambda e: e.count_parameters(),
    "dry run": lambda e: e.prune_neurons({"0": [1]}, dry_run=True),
    "journal": lambda e: e.journal,
    "entries": lambda e: list(e.journal),
    "history": lambda e: e.history,
    "evolution": lambda e: e.get_neuron_evolution(1),
    "life": lambda e: e.life,
}


def _undated(advice: Any) -> Any:
    advice["metadata"].pop("timestamp")
    return advice


@pytest.fixture
def engine() -> NeuronEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    with torch.no_grad():
        model[0].bias[3] = -100
    optimizer = torch.optim.Adam(model.parameters())
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    engine.attach_optimizer(optimizer)
    engine.expand_layer("0", 1)
    engine.start_self_modification(Policy(warm_up=0, every=4, look=2, settle=1, tolerance=0.0))
    for _ in range(6):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.step(loss)
    engine.stop_self_modification()
    engine.start_tracking(enable_correlation_analysis=True)
    model(X)
    engine.stop_tracking()
    engine.log_epoch_statistics(0, 1.0, 0.5)
    engine.kept = model  # the engine itself holds it weakly
    return engine


def plain(value: Any, depth: int = 0) -> Any:
    """A value as nested tuples of numbers and text, by which two are compared."""
    if isinstance(value, Tensor):
        return tuple(value.flatten().tolist())
    if isinstance(value, (dict, MappingProxyType)):
        return tuple((plain(k), plain(v, depth + 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(plain(v, depth + 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    if depth > 8 or not type(value).__module__.startswith("tracker"):
        return type(value).__name__
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return (type(value).__name__, plain(fields, depth + 1))
    slots = getattr(type(value), "__slots__", ())
    own = getattr(value, "__dict__", None) or {name: getattr(value, name, None) for name in slots}
    parts = list(value) if hasattr(value, "__iter__") else own
    return (type(value).__name__, plain(parts, depth + 1))


def spoil(value: Any, depth: int = 0) -> None:
    """Do to a value whatever its types let anybody do."""
    if depth > 6 or isinstance(value, (str, bytes, int, float, type(None), type)):
        return
    if isinstance(value, Tensor):
        value.fill_(-7)
    elif isinstance(value, (MutableMapping, MutableSequence, MutableSet, tuple)):
        parts = list(value.values()) if isinstance(value, MutableMapping) else list(value)
        for part in parts:
            spoil(part, depth + 1)
        if hasattr(value, "clear"):
            value.clear()
        if isinstance(value, MutableMapping):
            value["spoiled"] = 1
        elif isinstance(value, MutableSequence):
            value.append("spoiled")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            part = getattr(value, field.name, None)
            if not field.name.startswith("_") and field.repr:  # the others are for ourselves
                spoil(part, depth + 1)
    elif type(value).__module__.startswith("tracker") and hasattr(value, "__iter__"):
        for part in list(value):
            spoil(part, depth + 1)
        for method in ("clear", "pop"):
            if hasattr(value, method):
                getattr(value, method)()


def test_what_is_done_to_an_answer_changes_no_other(engine: NeuronEngine) -> None:
    expected = {name: plain(call(engine)) for name, call in CALLS.items()}
    for name, call in CALLS.items():
        spoil(call(engine))
        for other, again in CALLS.items():
            assert plain(again(engine)) == expected[other], f"{other}, after what {name} gave"
    assert engine.prune_neurons({"0": [1]}).promise
    engine.undo()


def test_an_answer_does_not_change_with_the_model(engine: NeuronEngine) -> None:
    answers = {name: call(engine) for name, call in CALLS.items()}
    receipts: dict[str, Receipt] = {}
    before = {name: plain(answer) for name, answer in answers.items()}
    receipts["prune"] = engine.prune_neurons({"0": [1, 3]}, compensate=False)
    told = copy.deepcopy(receipts["prune"].to_dict())
    engine.insert_layer("0")
    engine.expand_layer("2", 2)
    engine.start_tracking()
    engine.kept(X)
    engine.log_epoch_statistics(1, 0.5, 0.6)
    engine.undo()
    assert {name: plain(answer) for name, answer in answers.items()} == before
    assert receipts["prune"].to_dict() == told
    spoil(receipts["prune"].to_dict())
    assert receipts["prune"].to_dict() == told


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "high", None, True, float("nan")])
def test_a_threshold_that_is_set_is_checked(engine: NeuronEngine, value: Any) -> None:
    with pytest.raises(StatisticsError, match="correlation_threshold"):
        engine.correlation_threshold = value
    assert engine.correlation_threshold == 0.9

"""Nonsense in any argument of any public call is refused by an error of this library, and leaves all as it was."""

from __future__ import annotations

import copy
import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.surgery.bits import equal, everything
from tracker import NeuronEngine, Policy, SurgeryError, TrackerError

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


# Values that mean something to one argument or other, and nothing to most.
NONSENSE: list[Any] = [
    None, True, -1, 0, 10**9, 2**70, 0.5, -0.5, NAN, INF, "", "typo", b"0", [], {}, set(), (), [[]], ["typo"], [-1],
    [10**9], [NAN], [None], [(0,)], [(0, 0)], [(0, 10**9)], [(0, 1, 2)], {"typo": 60}, {"typo": [0]}, {"0": [10**9]},
    {"0": [-1]}, {"0": 3}, {"0": ["0"]}, {"0": NAN}, {"0": None}, {0: [0]}, {"0": 10**9}, [0, 0], object(),
    int, lambda *a: "typo", torch.zeros(0), torch.zeros(3, 2), torch.tensor(NAN), torch.zeros(2, 2, dtype=torch.int64),
    nn.Linear(2, 2), [torch.zeros(4, 99)], [(torch.zeros(4, 5), torch.zeros(4))], [{"typo": X}],
    [X.to(torch.complex64)], [X.double()], torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), NeuronEngine,
]  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)
    )


class Case:
    """An engine in the midst of its work, and all that nonsense must leave as it is."""

    def __init__(self) -> None:
        self.model, self.engine = net(), NeuronEngine()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.follower = copy.deepcopy(self.model)
        self.engine.track_model(self.model, "m", example_inputs=X)
        self.engine.attach_optimizer(self.optimizer)
        self.engine.attach_follower(self.follower)
        self.engine.start_tracking(enable_correlation_analysis=True)
        self.model(X).square().mean().backward()
        self.optimizer.step()
        self.engine.log_epoch_statistics(0, 1.0, 0.5)
        self.engine.prune_neurons({"0": [5]})
        self.engine.start_self_modification(Policy(look=1, settle=1, every=2, warm_up=0))

    def state(self) -> list[Any]:
        engine = self.engine
        session = engine.sessions.current
        return [
            *everything(self.model, self.optimizer, engine),
            {k: v.clone() for k, v in self.follower.state_dict().items()},
            (engine.activation_threshold, engine.correlation_threshold),
            [str(entry) for entry in engine.journal],
            [epoch.epoch for epoch in engine.history.epochs],
            [id(o) for o in (*session.optimizers, *session.followers)],
            [group.name for group in engine.structure.groups],
            engine.get_summary(),
            engine.get_dataset_statistics().__repr__(),
            (torch.get_rng_state(), session.ranks is None, engine.tracker.registry._next),
        ]


def required(case: Case, path: Path) -> dict[str, dict[str, Any]]:
    """Of each call that needs arguments, such as make sense."""
    group = case.engine.structure.groups[0].name
    ids = case.engine.tracker.current.layers["3"].ids
    saved = str(path / "file")
    return {
        "apply_recommendations": {
            "recommendations": case.engine.generate_optimization_recommendations()
        },
        "calibrate": {"batches": [X]},
        "expand_layer": {"layer_name": "3", "count": 1},
        "expand_layers": {"counts": {"3": 1}},
        "get_neuron_evolution": {"neuron_id": ids[0]},
        "get_neuron_info": {"neuron_id": ids[0]},
        "get_neuron_stats": {"neuron_id": ids[0]},
        "insert_layer": {"after": "3"},
        "load_checkpoint": {"path": saved, "fresh_model": net()},
        "load_training_history": {"path": saved},
        "log_epoch_statistics": {"epoch": 7},
        "merge_neurons": {"pairs": [ids[:2]]},
        "padding_mask": {"mask": torch.ones(24, 5, dtype=torch.bool)},
        "plot_correlation_matrix": {"layer_name": "3"},
        "prune_neurons": {"neurons": ids[:1]},
        "prune_units": {"units": {group: [0]}},
        "recycle_neurons": {"neurons": ids[:1]},
        "reestimate_norms": {"batches": [X]},
        "remove_layer": {"layer_name": "4", "force": True},
        "rewind": {"follower": case.follower},
        "save_checkpoint": {"path": saved},
        "save_html_report": {"path": saved},
        "save_optimization_recommendations": {"path": saved},
        "save_report_to_file": {"path": saved},
        "save_training_history": {"path": saved},
        "step": {"loss": 1.0},
        "track_model": {"model": net()},
    }


def arguments() -> list[tuple[str, str]]:
    """Every argument of every public call."""
    found = []
    for name, _ in inspect.getmembers(NeuronEngine, callable):
        if not name.startswith("_"):
            parameters = inspect.signature(getattr(NeuronEngine, name)).parameters
            found += [(name, p) for p in parameters if p != "self"]
    return found


def give(case: Case, call: str, argument: str, value: Any, path: Path) -> Exception | None:
    """Make a call that makes sense but for one argument; what it raises."""
    method = getattr(case.engine, call)
    kinds = {p.name: p.kind for p in inspect.signature(method).parameters.values()}
    quick = {"progress": False, "show_heatmap": False, "include_heatmap": False}
    options = {k: v for k, v in quick.items() if k in kinds}
    options |= required(case, path).get(call, {})
    positional: tuple[Any, ...] = ()
    if kinds[argument] is inspect.Parameter.VAR_POSITIONAL:
        positional = (value,)
    elif kinds[argument] is inspect.Parameter.VAR_KEYWORD:
        options["pruning_threshold"] = value
    else:
        options[argument] = value
    try:
        method(*positional, **options)
    except Exception as error:
        return error
    return None


def refused(values: list[tuple[str, str, Any]], path: Path) -> None:
    """All of these are refused, or taken; what is refused leaves all as it was."""
    case = Case()
    before = case.state()
    for call, argument, value in values:
        error = give(case, call, argument, value, path)
        if error is None:  # this one means something
            assert value is not (call, argument)
            case = Case()
            before = case.state()
            continue
        # What a file system says of a path is its own.
        allowed = (
            (TrackerError, OSError) if "path" in argument or "heatmap" in argument else TrackerError
        )
        if not isinstance(error, allowed):
            raise AssertionError((call, argument, type(value))) from error
        assert str(error), (call, argument)
    assert equal(case.state(), before), values


EVERY = list(enumerate(arguments()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nonsense_is_refused_and_leaves_no_trace(folder: Path) -> None:
    """A few values for each argument, others for the next."""
    some = []
    for number, (call, argument) in EVERY:
        chosen = [NONSENSE[(7 * number + 13 * k) % len(NONSENSE)] for k in range(2)]
        some += [(call, argument, value) for value in chosen]
    refused(some, folder)


# All of them: TRACKER_LONG=1 (make long). Else every sixteenth.
STRIDE = int(os.environ.get("TRACKER_LONG", "16"))


@pytest.mark.slow
@pytest.mark.parametrize(("call", "argument"), [pair for _, pair in EVERY[::STRIDE]])
def test_all_nonsense_is_refused_and_leaves_no_trace(
    call: str, argument: str, folder: Path
) -> None:
    refused([(call, argument, value) for value in NONSENSE], folder)


@pytest.mark.parametrize("field", [f.name for f in fields(Policy) if f.name != "protect"])
def test_a_policy_takes_no_nonsense(field: str) -> None:
    usual = Policy()
    for value in NONSENSE:
        try:
            policy = Policy(**{field: value})
        except SurgeryError:
            continue
        kept = getattr(policy, field)
        kind = type(getattr(usual, field))
        numbers = isinstance(kept, (int, float)) and not isinstance(kept, bool)
        assert kept is None or type(kept) is kind or numbers, value
        assert kept is None or (kept == kept and kept >= 0), value


CONTRADICTIONS: list[dict[str, Any]] = [
    {"floor": 8, "ceiling": 2},
    {"min_parameters": 100, "max_parameters": 10},
    {"min_flops": 100, "max_flops": 10},
    {"min_latency": 2.0, "max_latency": 1.0},
    {"every": 10, "look": 8, "settle": 4},
]


@pytest.mark.parametrize("options", CONTRADICTIONS, ids=str)
def test_a_policy_that_can_do_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError):
        Policy(**options)


NAMES: dict[str, Any] = {
    "compress": lambda e: e.compress(0.5, floor={"typo": 60}),
    "prune_units": lambda e: e.prune_units({"typo": [0]}),
    "prune_neurons": lambda e: e.prune_neurons({"typo": [0]}),
    "recycle_neurons": lambda e: e.recycle_neurons({"typo": [0]}),
    "expand_layer": lambda e: e.expand_layer("typo", 1),
    "expand_layers": lambda e: e.expand_layers({"3": 1}, directions={"typo": torch.zeros(1, 6)}),
    "insert_layer": lambda e: e.insert_layer("typo"),
    "remove_layer": lambda e: e.remove_layer("typo"),
    "plot_correlation_matrix": lambda e: e.plot_correlation_matrix("typo"),
    "start_tracking": lambda e: e.start_tracking(layers=["typo"]),
    "track_model (axes)": lambda e: e.track_model(net(), axes={"typo": 1}),
    "track_model (unread)": lambda e: e.track_model(net(), assume_unread=["typo"]),
}


@pytest.mark.parametrize("call", NAMES)
def test_a_name_that_nothing_has_is_an_error(call: str) -> None:
    case = Case()
    before = case.state()
    with pytest.raises(TrackerError, match="typo"):
        NAMES[call](case.engine)
    assert equal(case.state(), before)

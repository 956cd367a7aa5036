"""What is named stays: layers, groups, patterns, shares and neurons, in every change that may remove."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.surgery.subjects import equal, prepared, snapshot
from tests.training.subjects import QUICK, trained
from tracker import NeuronEngine, Policy, SurgeryError, UnknownNeuronError
from tracker.training.policy import Requests

NAMES = {
    "mlp": ["0", "2", "[02]"],
    "conv": ["0", "4", "7", "1", "[47]"],
    "gated": ["gate", "up", "*"],
    "residual": ["blocks.0", "blocks.*.1", "blocks.[12].*"],
}


def of(layers: dict[str, list[int]], pattern: str) -> dict[str, set[int]]:
    """Ids of the layers that a name of NAMES stands for, by hand."""
    under = {
        "[02]": ("0", "2"), "[47]": ("4", "7"), "*": ("gate", "up"), "blocks.0": ("blocks.0.1",),
        "blocks.*.1": ("blocks.0.1", "blocks.1.1", "blocks.2.1"), "blocks.[12].*": ("blocks.1.1", "blocks.2.1"),
    }.get(pattern, (pattern,))  # fmt: skip
    return {name: set(layers[name]) for name in under}


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_compress_leaves_what_is_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(NAMES)))
    pattern = data.draw(st.sampled_from(NAMES[name]))
    share = data.draw(st.sampled_from([None, 1.0, 0.75, 0.5]))
    criterion = data.draw(st.sampled_from(["reconstruction", "magnitude"]))
    rounds = data.draw(st.sampled_from([1, 2]))
    model, opt, engine, x = prepared(name)
    before = copy.deepcopy(engine.track_model(model))
    ids = list(next(iter(before.values())))[2:5]  # of the first layer
    protect: Any = {pattern: share} if share is not None else [pattern, *ids]
    engine.calibrate([x])
    free = snapshot(model, opt)
    try:
        engine.compress(
            0.7, protect=protect, inexact=True, criterion=criterion, rounds=rounds, batches=[x]
        )
    except SurgeryError:
        assert equal(free, snapshot(model, opt))  # what is left cannot meet the budget
        return
    after = engine.track_model(model)
    for layer, old in of(before, pattern).items():
        kept = old & set(after[layer])
        assert len(kept) >= (1.0 if share is None else share) * len(old) - 1e-9
    if share is None:
        assert set(ids) <= {i for layer in after.values() for i in layer}
    assert sum(map(len, after.values())) < sum(map(len, before.values()))


def test_shares_bind() -> None:
    """Without protection more would go: the floor is met exactly."""
    _model, _, engine, x = prepared("mlp")
    engine.calibrate([x])
    free = engine.compress(0.55, dry_run=True)
    bound = engine.compress(0.55, protect={"0": 11 / 12}, dry_run=True)
    assert len(free.units["0"]) > 1 == len(bound.units["0"])
    assert len(bound.units["2"]) > len(free.units["2"])


def test_floors_take_patterns() -> None:
    _model, _, engine, x = prepared("mlp")
    engine.calibrate([x])
    receipt = engine.compress(0.6, floor={"[02]": 7}, dry_run=True)
    assert len(receipt.units["0"]) <= 5
    assert len(receipt.units.get("2", [])) <= 2


def test_pruning_skips_what_is_protected_and_tells() -> None:
    model, opt, engine, _ = prepared("mlp")
    ids = copy.deepcopy(engine.track_model(model))
    asked = [*ids["0"][:6], *ids["2"][:2]]
    receipt = engine.prune_neurons(asked, protect=["2", ids["0"][1]])
    assert sorted(set(receipt.removed_ids) & set(asked)) == [
        i for i in ids["0"][:6] if i != ids["0"][1]
    ]
    assert len(receipt.skipped) == 2
    assert all("protected" in reason for reason in receipt.skipped)
    receipt = engine.prune_units({"2": [8, 3, 1, 0]}, protect={"2": 0.75})
    assert receipt.units == {"2": [3, 8]}
    before = snapshot(model, opt)
    with pytest.raises(SurgeryError, match="All that is to go is protected"):
        engine.prune_units({"2": [0, 1]}, protect="2")
    assert equal(before, snapshot(model, opt))


@pytest.mark.parametrize("protect", ["layer0", ["0", "layer*"], {"layer0": 0.5}])
def test_a_name_that_matches_nothing_is_an_error(protect: Any) -> None:
    model, opt, engine, _ = prepared("mlp")
    before = snapshot(model, opt)
    for call in (
        lambda: engine.compress(0.5, protect=protect),
        lambda: engine.compress(0.5, floor={"layer0": 5}),
        lambda: engine.prune_neurons([0], protect=protect),
        lambda: engine.start_self_modification(Policy(protect=protect)),
    ):
        with pytest.raises(SurgeryError, match="Nothing is named 'layer"):
            call()
    with pytest.raises(UnknownNeuronError):
        engine.compress(0.5, protect=[10**6])
    for wrong in ({"0": 2}, {"0": True}, {0: 0.5}, [None], 0.5):
        with pytest.raises(SurgeryError):
            engine.compress(0.5, protect=wrong)  # type: ignore[arg-type]
        with pytest.raises(SurgeryError):
            Policy(protect=wrong)  # type: ignore[arg-type]
    assert equal(before, snapshot(model, opt))


@pytest.mark.parametrize("merge", [False, True])
def test_policies_leave_it_alone_too(merge: bool) -> None:
    model, opt, engine, x = prepared("mlp")
    options = {**QUICK, "tolerance": 1.0, "at_most": 0.9, "merge": merge, "regret": 1e9}
    engine.start_self_modification(Policy(**options, protect={"0": 0.75}))  # type: ignore[arg-type]
    trained(model, opt, engine, x, 60)
    assert (
        len(engine.track_model(model)["0"]) == 9
    )  # of the 12 at the beginning, whatever the looks
    pinned = engine.track_model(model)["2"][:2]
    engine.start_self_modification(Policy(**options, protect=["0", *pinned]))  # type: ignore[arg-type]
    kept = list(engine.track_model(model)["0"])
    trained(model, opt, engine, x, 60)
    assert engine.track_model(model)["0"] == kept
    assert set(pinned) <= set(engine.track_model(model)["2"])


class Greedy(Policy):
    """Wants what it must not have."""

    def decide(self, *args: Any, **options: Any) -> Requests:
        return Requests("all of it", remove={"0": tuple(range(8)), "2": (0, 1)})


def test_own_policies_cannot_help_it() -> None:
    model, opt, engine, x = prepared("mlp")
    before = copy.deepcopy(engine.track_model(model))
    engine.start_self_modification(Greedy(**QUICK, regret=1e9, protect=["0"]))  # type: ignore[arg-type]
    trained(model, opt, engine, x, 16)
    after = engine.track_model(model)
    assert after["0"] == before["0"]
    assert after["2"] == before["2"][2:]


def test_a_policy_with_protection_comes_back_from_json() -> None:
    for protect in (["head", 3], {"blocks.*": 0.5}, "stem", ()):
        policy = Policy(protect=protect)
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_layers_are_not_dropped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    x, engine = torch.randn(64, 4), NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    for protect, goes in (((), True), ("[01]", False)):
        opt = torch.optim.SGD(model.parameters(), 1e-6)
        engine.attach_optimizer(opt)
        policy = Policy(**QUICK, shrink=False, drop=1e-2, protect=protect)  # type: ignore[arg-type]
        engine.start_self_modification(policy)
        trained(model, opt, engine, x, 12)
        dropped = [d for d in engine.life if d.what == "dropped"]
        assert bool(dropped) is goes
        if goes:
            engine.undo()

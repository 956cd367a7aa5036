"""A receipt says to people what changed: which layer, units and neurons apart, and the FLOPs of one sample."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.surgery.subjects import equal, prepared, snapshot
from tracker import NeuronEngine


def norm_net() -> tuple[nn.Module, NeuronEngine, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2),
    ).eval()  # fmt: skip
    x = torch.randn(5, 1, 8, 8)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    return model, engine, x


def test_units_and_neurons_are_told_apart() -> None:
    _model, engine, _ = norm_net()
    text = str(engine.prune_units({"0": [1, 2, 3]}))
    assert "3 channels gone, 6 neurons with those of norms and shortcuts" in text
    assert "neurons of 0 8 -> 5" in text
    assert "3 channels back, 6 neurons with" in str(engine.undo())
    _model, _, engine, _ = prepared("mlp")
    assert "prune_units (done): 2 neurons gone\n" in str(engine.prune_units({"0": [1, 2]}))


@pytest.mark.parametrize("dry_run", [False, True])
def test_growth_names_its_layer(dry_run: bool) -> None:
    _model, engine, _ = norm_net()
    receipt = engine.expand_layer("3", 3, dry_run=dry_run)
    assert receipt.widths == {"3": [4, 7]}
    assert "3 neurons new" in str(receipt)
    assert "neurons of 3 4 -> 7" in str(receipt)
    several = engine.expand_layers({"0": 2, "3": 1}, dry_run=dry_run)
    assert several.widths["0"] == [8, 10]
    assert several.widths["3"][1] - several.widths["3"][0] == 1


def test_work_is_of_one_sample() -> None:
    """Whatever the size of the example."""
    told = []
    for samples in (1, 7):
        torch.manual_seed(0)
        model, engine = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), NeuronEngine()
        engine.track_model(model, "m", example_inputs=torch.randn(samples, 6))
        receipt = engine.prune_units({"0": [0]}, verify=False)
        assert receipt.samples == samples
        told.append(str(receipt))
    assert told[0] == told[1]
    assert "FLOPs of one sample 128 -> 112" in told[0]


def test_undo_has_one_that_mirrors() -> None:
    _model, engine, _ = norm_net()
    receipt = engine.compress(0.6)
    back = engine.undo()
    assert back.widths == {name: [b, a] for name, (a, b) in receipt.widths.items()}
    assert (back.parameters_before, back.parameters_after) == (
        receipt.parameters_after,
        receipt.parameters_before,
    )
    assert back.kinds == receipt.kinds
    assert " back" in str(back)
    json.dumps(back.to_dict())


CHANGES = ("prune_units", "prune_neurons", "merge_neurons", "expand_layer", "expand_layers", "recycle_neurons",
           "insert_layer", "remove_layer", "compress", "uniform_widths", "apply_recommendations")  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_arguments_agree(name: str) -> None:
    known = inspect.signature(getattr(NeuronEngine, name)).parameters
    assert known["dry_run"].default is False
    assert known["verify"].default is True
    for call in ("calibrate", "compress"):
        for shared in ("batches", "loss", "inputs", "progress", "seed", "protect"):
            theirs = inspect.signature(getattr(NeuronEngine, call)).parameters.get(shared)
            if (
                shared in known
                and theirs is not None
                and theirs.default is not inspect.Parameter.empty
            ):
                assert known[shared].default == theirs.default
    if "batches" in known:
        assert {"inputs", "progress"} <= known.keys()


def test_former_names_are_accepted() -> None:
    texts = []
    for options in ("neurons", "neuron_ids"):
        _model, _, engine, _ = prepared("mlp")
        texts.append(str(engine.recycle_neurons(**{options: [0, 1]})))  # type: ignore[arg-type]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("call", ["units", "neurons"])
def test_pruning_takes_batches(call: str) -> None:
    """As after `calibrate` on those that are not held back; a dry run leaves what was calibrated."""
    results: list[Any] = []
    for inline in (False, True):
        model, opt, engine, x = prepared("mlp")
        parts = list(zip(x.split(60), x.split(60), strict=True))
        if not inline:
            engine.calibrate([p for i, p in enumerate(parts) if i % 4 != 3])
        options: Any = {"batches": parts} if inline else {}
        change = engine.prune_units if call == "units" else engine.prune_neurons
        what: Any = {"0": [1, 2, 3]}
        if inline:
            change(what, compensate=True, batches=[3 * x + 1], dry_run=True)
        receipt = change(what, compensate=True, **options)
        assert (receipt.loss_after is not None) is inline
        results.append(snapshot(model, opt)[0])
    assert equal(*results)

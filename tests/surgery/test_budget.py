"""Budgets that are met, advice that is taken, and what else holds of takeovers and removed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.subjects import (
    MODELS,
    apart,
    equal,
    holds_exactly_the_live,
    prepared,
    snapshot,
    train,
)
from tracker import (
    NeuronEngine,
    StructureError,
    SurgeryError,
    TrackerError,
    UnknownNeuronError,
    VerificationError,
)


@pytest.mark.parametrize("name", MODELS)
def test_takeover_beats_zero(name: str) -> None:
    model, _, engine, x = prepared(name)
    y = model(x).detach()
    engine.calibrate([x])
    group = next(g for g in engine.structure.groups if g.prunable and g.exact)
    units = {group.name: list(range(0, group.size - 1, 3))}
    errors = []
    for compensate in (True, False):
        engine.prune_units(units, compensate=compensate)
        errors.append(float((model(x).detach() - y).square().mean()))
        engine.undo()
    assert errors[0] < errors[1]
    assert torch.equal(model(x).detach(), y)


def test_a_branch_of_a_sum_goes_and_leaves_zero() -> None:
    """The sum stands outside of the block: its input in its place would count twice."""
    model, opt, engine, x = prepared("residual")
    expected, before = model(x).detach(), snapshot(model, opt)
    receipt = engine.remove_layer("blocks.1", batches=[x], force=True)
    error = apart(model(x).detach(), expected)
    holds_exactly_the_live(model, opt)
    assert receipt.parameters_after < receipt.parameters_before
    assert "explains" in receipt.notes[0]
    assert receipt.removed_ids
    engine.undo()
    assert equal(snapshot(model, opt), before)
    # nothing in its place, and nothing made up for
    for p in model.blocks[1][3].parameters():
        nn.init.zeros_(p)
    assert error < apart(model(x).detach(), expected)


@pytest.mark.parametrize("of", ["neurons", "parameters", "flops"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_compression_meets_its_budget(name: str, of: str) -> None:
    model, opt, engine, x = prepared(name)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, -3.0
    engine.calibrate([x])
    units = sum(g.size for g in engine.structure.groups if g.prunable)
    receipt = engine.compress(0.6, of, progress=False)
    left = sum(g.size for g in engine.structure.groups if g.prunable)
    achieved = {
        "neurons": left / units,
        "parameters": receipt.parameters_after / receipt.parameters_before,
        "flops": receipt.flops_after / receipt.flops_before,
    }[of]
    assert abs(achieved - 0.6) <= 0.02
    assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
    holds_exactly_the_live(model, opt)
    assert 1 in receipt.removed_ids  # the one that says nothing is the first to go
    train(model.train(), opt, x)


def test_what_breaks_torch_s_own_fast_path_is_undone() -> None:
    """An encoder layer's fast path reads the weights of its linear layers itself."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    engine = NeuronEngine()
    engine.track_model(model, "encoder", example_inputs=x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(VerificationError, match="does not run"):
        engine.remove_layer("linear1", force=True)
    assert equal(dict(model.state_dict()), before)
    model(x)


def test_a_compression_that_cannot_be_met_says_so() -> None:
    model, opt, engine, _ = prepared("mlp")
    before = snapshot(model, opt)
    for keep, of, why in (
        (0.001, "parameters", "keeps one unit"),
        (2.0, "flops", "share"),
        (0.5, "love", "one of"),
    ):
        with pytest.raises(SurgeryError, match=why):
            engine.compress(keep, of, progress=False)
    assert equal(snapshot(model, opt), before)


def test_recommendations_become_one_change(tmp_path: Any) -> None:
    model, opt, engine, x = prepared("mlp")
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, -1.0
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[3], 2 * model[0].bias[3]
    engine.start_tracking(enable_correlation_analysis=True)
    expected = model(x).detach()
    engine.stop_tracking()
    advice = engine.generate_optimization_recommendations(pruning_threshold=0.0)
    before = snapshot(model, opt)
    path = engine.save_optimization_recommendations(tmp_path / "a.json", pruning_threshold=0.0)
    dry = engine.apply_recommendations(path, dry_run=True)
    assert dry.dry_run
    assert equal(snapshot(model, opt), before)
    receipt = engine.apply_recommendations(advice)
    assert {1} < set(receipt.removed_ids)
    assert {3, 4} & set(receipt.removed_ids)
    assert apart(model(x).detach(), expected) < 10 * receipt.output_difference + 1e-5
    engine.undo()
    assert equal(snapshot(model, opt), before)
    for bad in ({}, {"prune": [{}], "merge": [], "expand": []}, {**advice, "schema_version": "9"}):
        with pytest.raises(SurgeryError):
            engine.apply_recommendations(bad)
    with pytest.raises(SurgeryError, match="can be read from"):
        engine.apply_recommendations(tmp_path / "nothing.json")
    assert equal(snapshot(model, opt), before)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.layer = kind(5, 7, batch_first=True, **options)
        self.out = nn.Linear(14 if options.get("bidirectional") else 7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x)[0])


class Cell(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer, self.out = kind(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in x.unbind(1):
            state = self.layer(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Recurrent(nn.LSTM),
        lambda: Recurrent(nn.GRU),
        lambda: Recurrent(nn.LSTM, bidirectional=True),
        lambda: Recurrent(nn.LSTM, num_layers=2),
        lambda: Cell(nn.LSTMCell),
        lambda: Cell(nn.GRUCell),
    ],
)
def test_hidden_units_of_recurrent_layers_are_neurons(build: Any) -> None:
    """Their ids leave and come with them, and the window goes on."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(4, 6, 5)
    engine = NeuronEngine()
    ids = engine.track_model(model, "m", example_inputs=x)
    engine.start_tracking()
    with torch.no_grad():
        expected = model(x)
    own, width = list(ids["layer"]), len(ids["layer"])
    seen = engine.get_neuron_stats(own[3])["batches"]
    group = next(g for g in engine.structure.groups if g.prunable and "layer" in g.layers)
    receipt = engine.prune_units({group.name: [2]})
    directions = width // 7
    assert receipt.removed_ids == [own[2 + 7 * d] for d in range(directions)]
    assert engine.track_model(model)["layer"] == [n for n in own if n not in receipt.removed_ids]
    assert model.layer.hidden_size == 6
    with torch.no_grad():
        model(x)
    assert engine.get_neuron_stats(own[3])["batches"] == 2 * seen
    engine.undo()
    assert engine.track_model(model)["layer"] == own
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    grown = engine.expand_layer("layer", 2 * directions)
    assert grown.promise == "exact"
    assert len(engine.track_model(model)["layer"]) == width + 2 * directions
    with torch.no_grad():
        assert apart(model(x), expected) < 1e-5


def test_what_makes_no_sense_is_refused_in_words() -> None:
    model, opt, engine, x = prepared("mlp")
    before = snapshot(model, opt)
    calls: list[tuple[Any, type[TrackerError], str]] = [
        (lambda: engine.prune_neurons(3), UnknownNeuronError, "a list of ids"),  # type: ignore[arg-type]
        (lambda: engine.prune_neurons("0"), UnknownNeuronError, "a list of ids"),  # type: ignore[arg-type]
        (lambda: engine.prune_neurons([1.5]), UnknownNeuronError, "an integer"),  # type: ignore[list-item]
        (lambda: engine.prune_neurons([]), SurgeryError, "Nothing was asked"),
        (lambda: engine.merge_neurons([(1,)]), SurgeryError, "keep id, drop id"),  # type: ignore[list-item]
        (lambda: engine.merge_neurons([1, 2]), SurgeryError, "keep id, drop id"),  # type: ignore[list-item]
        (lambda: engine.compress("half"), SurgeryError, "a share between 0 and 1"),  # type: ignore[arg-type]
        (lambda: engine.compress(float("nan")), SurgeryError, "a share between 0 and 1"),
        (lambda: engine.calibrate([torch.randn(3, 99)]), StructureError, "forward pass"),
    ]
    for call, kind, why in calls:
        with pytest.raises(kind, match=why):
            call()
    assert equal(snapshot(model, opt), before)
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    broken = NeuronEngine()
    broken.track_model(model, "broken", example_inputs=x[:8])
    with pytest.raises(SurgeryError, match="output on the example inputs is not finite"):
        broken.prune_neurons([1])


class Joined(nn.Module):
    """A consumer that reads two groups: columns of the other one are no units of either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(torch.cat((self.a(x), self.b(x)), 1)))


def test_of_two_groups_that_one_consumer_reads_the_silent_units_go() -> None:
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(400, 6)
    silent = {"a": [1], "b": [4, 7]}
    with torch.no_grad():
        for name, units in silent.items():
            layer = model.get_submodule(name)
            layer.weight[units], layer.bias[units] = 0.0, -1.0
        before = model(x)
    engine = NeuronEngine()
    engine.track_model(model, "joined", x[:16])
    receipt = engine.compress(15 / 18, of="neurons", batches=[x], progress=False)
    assert receipt.units == silent
    assert receipt.promise == "exact"
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-5)

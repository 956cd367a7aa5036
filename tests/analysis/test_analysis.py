"""Findings and recommendations, on networks with planted faults."""

from __future__ import annotations

import itertools
import json
import math
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from tracker import NeuronEngine, StatisticsError

DEAD, CONSTANT, TWIN, SCALED, NEGATED = 1, 2, 4, 6, 8  # slots of the first layer; twins of slot 3


def planted() -> nn.Sequential:
    """A hidden layer of 12 neurons with known faults."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    first = model[0]
    with torch.no_grad():
        for slot, factor, shift in ((TWIN, 1, 0), (SCALED, 2.5, 1), (NEGATED, -1, 0)):
            first.weight[slot] = factor * first.weight[3]
            first.bias[slot] = factor * first.bias[3] + shift
        first.weight[DEAD], first.bias[DEAD] = 0, 0
        first.weight[CONSTANT], first.bias[CONSTANT] = 0, 0.7
    return model


@pytest.fixture
def engine() -> NeuronEngine:
    model = planted()
    engine = NeuronEngine(observe="output")  # a negated twin is a twin before its ReLU only
    engine.track_model(model, "planted")
    engine.start_tracking(enable_correlation_analysis=True)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        model(torch.randn(50, 10, generator=g))
    engine.stop_tracking()
    engine.model = model  # keep it alive
    return engine


def test_dead_and_constant_neurons_are_found(engine: NeuronEngine) -> None:
    assert engine.get_dead_neurons() == {"0": [DEAD], "2": [], "4": []}
    assert engine.get_neuron_stats(DEAD)["status"] == "dead"
    assert engine.get_neuron_stats(CONSTANT)["status"] == "constant"
    assert engine.get_neuron_stats(CONSTANT)["variance"] == 0
    assert engine.get_neuron_stats(0)["status"] == "active"
    row = engine.get_layer_summary()["0"]
    assert (row["dead_neurons"], row["constant_neurons"]) == (1, 1)
    assert row["dead_percentage"] == pytest.approx(100 / 12)


def test_redundant_neurons_are_found(engine: NeuronEngine) -> None:
    pairs = engine.find_redundant_neurons(correlation_threshold=0.999)
    group = (3, TWIN, SCALED, NEGATED)
    assert {p[:2] for p in pairs["0"]} == set(itertools.combinations(sorted(group), 2))
    assert {round(r) for i, j, r in pairs["0"] if NEGATED in (i, j)} == {-1}
    assert pairs["2"] == []
    summary = engine.get_redundancy_summary(0.999)["0"]
    assert summary["redundant_pairs"] == 6
    assert summary["redundancy_rate"] == pytest.approx(6 / 66)


def test_words_of_the_brief_and_of_the_field() -> None:
    """`sparsity` is the share of non-zero values, `zero_fraction` the share of zeros."""
    model = nn.Sequential(nn.Embedding(2, 3))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking()
    model(torch.tensor([0, 0, 0, 1]))
    stats = [engine.get_neuron_stats(i) for i in range(3)]
    assert [s["sparsity"] for s in stats] == [0.25, 1.0, 0.0]
    assert [s["zero_fraction"] for s in stats] == [0.75, 0.0, 1.0]
    assert [s["firing_frequency"] for s in stats] == [0.25, 1.0, 0.0]
    assert stats[0]["variance"] == pytest.approx(0.75)


def test_the_threshold_of_firing() -> None:
    model = nn.Sequential(nn.Embedding(4, 1))
    with torch.no_grad():
        model[0].weight[:, 0] = torch.tensor([0.01, -0.011, 0.5, 0.009])
    engine = NeuronEngine(activation_threshold=0.01)
    engine.track_model(model)
    engine.start_tracking()
    model(torch.arange(4))
    assert engine.get_neuron_stats(0)["firing_frequency"] == 0.5


def test_nonfinite_neurons_are_never_dead() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0, torch.nan
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking()
    x = torch.ones(4, 3)
    x[0, 0] = torch.inf  # neuron 0 is 0 * inf = NaN once, else 0
    model(x)
    assert engine.get_dead_neurons() == {"0": []}
    assert [engine.get_neuron_stats(i)["status"] for i in range(2)] == ["non-finite"] * 2
    assert engine.get_neuron_stats(0)["nonfinite"] == 1


def test_recommendations_find_what_was_planted(engine: NeuronEngine) -> None:
    r = engine.generate_optimization_recommendations(redundancy_threshold=0.999)
    assert {(c["neuron_id"], c["reason"]) for c in r["prune"]} == {
        (DEAD, "dead"),
        (CONSTANT, "constant"),
    }
    drops = [c["neuron_pair"][1] for c in r["merge"]]
    assert len(drops) == len(set(drops)) == 3
    assert {n for c in r["merge"] for n in c["neuron_pair"]} == {3, TWIN, SCALED, NEGATED}
    assert r["statistics"] == {
        "total_prunable_neurons": 2,
        "total_mergeable_pairs": 3,
        "layers_needing_expansion": len(r["expand"]),
    }
    assert r["metadata"]["model_info"]["layer_details"] == {"0": 12, "2": 6, "4": 3}


def test_a_merge_says_how_well_one_explains_the_other(engine: NeuronEngine) -> None:
    r = engine.generate_optimization_recommendations(redundancy_threshold=0.999)
    for c in r["merge"]:
        keep, drop = (engine.get_neuron_stats(n) for n in c["neuron_pair"])
        predicted = c["scale"] * keep["mean"] + c["offset"]
        assert predicted == pytest.approx(drop["mean"], abs=1e-4)
        assert abs(c["scale"]) * keep["std_deviation"] == pytest.approx(
            drop["std_deviation"], rel=1e-4
        )
        assert c["explained_variance"] == pytest.approx(1, abs=1e-5)
        same = {*c["neuron_pair"]} == {3, TWIN}
        assert c["merge_strategy"] == ("average_weights" if same else "affine_fold")


def test_nothing_is_recommended_twice_or_in_conflict(engine: NeuronEngine) -> None:
    for redundancy, pruning in itertools.product((0.05, 0.3, 0.9), (0.0, 0.5, 1.0)):
        r = engine.generate_optimization_recommendations(pruning, redundancy, 0.0)
        pruned = [c["neuron_id"] for c in r["prune"]]
        kept = [c["neuron_pair"][0] for c in r["merge"]]
        folded = [c["neuron_pair"][1] for c in r["merge"]]
        assert len(set(pruned + folded)) == len(pruned) + len(folded)
        assert not set(kept) & set(pruned + folded)
        shrinking = {c["layer_name"] for c in r["prune"] + r["merge"]}
        growing = [c["layer_name"] for c in r["expand"]]
        assert not shrinking & set(growing)
        assert len(growing) == len(set(growing))
        # The model's outputs are left alone, and no layer is emptied.
        assert "4" not in shrinking | set(growing)
        for name, size in {"0": 12, "2": 6}.items():
            gone = [c for c in r["prune"] + r["merge"] if c["layer_name"] == name]
            assert len(gone) < size


def test_expansion_of_a_busy_layer(engine: NeuronEngine) -> None:
    r = engine.generate_optimization_recommendations(0.01, 1.0, saturation_threshold=0.9)
    (expand,) = r["expand"]
    assert expand["layer_name"] == "2"
    assert expand["suggested_expansion"] == 2
    assert "not measured" in expand["basis"]
    assert expand["avg_activity"] == pytest.approx(
        engine.get_layer_summary()["2"]["avg_firing_frequency"]
    )
    assert not engine.generate_optimization_recommendations(0.01, 1.0, saturation_threshold=1.0)[
        "expand"
    ]


def test_without_correlation_there_are_no_merges_and_a_note() -> None:
    model = planted()
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking()
    model(torch.randn(50, 10))
    r = engine.generate_optimization_recommendations()
    assert r["merge"] == []
    assert any("correlation" in note for note in r["metadata"]["notes"])


def test_recommendations_match_their_schema(engine: NeuronEngine, tmp_path: Path) -> None:
    engine.generate_optimization_recommendations(0.01, 0.9, 0.5)
    path = engine.save_optimization_recommendations(tmp_path / "deep" / "optimization.json")
    data = json.loads(path.read_text())
    schema = json.loads(
        (files("tracker") / "schemas" / "optimization_recommendations.json").read_text()
    )
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)
    assert data["schema_version"]
    for broken in ({**data, "prune": [{}]}, {**data, "extra": 1}, {"prune": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_bad_thresholds_are_refused(engine: NeuronEngine) -> None:
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(StatisticsError, match="between 0 and 1"):
            engine.generate_optimization_recommendations(pruning_threshold=bad)
        with pytest.raises(StatisticsError, match="between 0 and 1"):
            engine.find_redundant_neurons(correlation_threshold=bad)


def test_nothing_observed_is_an_error_not_an_empty_answer() -> None:
    engine, model = NeuronEngine(), planted()
    engine.track_model(model)
    for call in (
        engine.generate_optimization_recommendations,
        engine.generate_neuron_report,
        engine.generate_pruning_recommendations,
        engine.plot_activity_heatmap,
        lambda: engine.log_epoch_statistics(0, 1.0, 0.5),
    ):
        with pytest.raises(StatisticsError, match="observed"):
            call()


def test_candidates_are_ranked(engine: NeuronEngine, capsys: pytest.CaptureFixture[str]) -> None:
    rows = engine.generate_pruning_recommendations(top_n=5)
    assert [r["neuron_id"] for r in rows[:2]] == [DEAD, CONSTANT]
    assert [r["status"] for r in rows[:3]] == ["DEAD", "CONST", "LOW"]
    scores = [r["score"] for r in rows]
    assert scores == sorted(scores)
    assert len(rows) == 5
    assert "TOP 5 PRUNING CANDIDATES" in capsys.readouterr().out


def test_advice_is_of_the_present_window(engine: NeuronEngine, tmp_path: Path) -> None:
    """Not of an earlier one, nor of another model."""
    first = engine.save_optimization_recommendations(tmp_path / "first.json")
    kept = json.loads(first.read_text())
    again = engine.save_optimization_recommendations(tmp_path / "again.json")
    assert json.loads(again.read_text()) == kept  # the very same, its timestamp too
    other = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2))
    engine.track_model(other, "other")
    with pytest.raises(StatisticsError, match="observed"):
        engine.save_optimization_recommendations(tmp_path / "other.json")
    engine.start_tracking()
    other(torch.randn(20, 10))
    path = engine.save_optimization_recommendations(tmp_path / "other.json")
    assert json.loads(path.read_text())["metadata"]["model_info"]["model_name"] == "other"


def test_the_threshold_is_fixed_for_life(engine: NeuronEngine) -> None:
    with pytest.raises(AttributeError):
        engine.activation_threshold = 0.5
    assert engine.activation_threshold == 0.01


def test_a_layer_without_two_neurons_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking(enable_correlation_analysis=True)
    model(torch.randn(20, 3))
    assert engine.find_redundant_neurons() == {"0": []}
    engine.print_correlation_analysis()
    assert "no correlation and are in no pair: 4" in capsys.readouterr().out
    with pytest.raises(StatisticsError, match="no two neurons to compare"):
        engine.plot_correlation_matrix("0")


def test_what_several_others_determine_is_found() -> None:
    """No pair repeats the other, but one neuron is the sum of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[0] + model[0].weight[1]
        model[0].weight[5], model[0].bias[5] = 0, 1.0
    engine = NeuronEngine()
    engine.track_model(model, "sum")
    engine.start_tracking(enable_correlation_analysis=True)
    x = torch.randn(4000, 10)
    model(x)
    shares = engine.get_explained_shares()["0"]
    assert [shares[n] > 0.999 for n in range(5)] == [True, True, False, False, True]
    assert math.isnan(shares[5])
    assert engine.find_redundant_neurons(0.99)["0"] == []
    h = model[0](x).detach().double()
    others = torch.cat((h[:, [0, 1, 3]], torch.ones(4000, 1)), 1)
    left = h[:, 2:3] - others @ torch.linalg.lstsq(others, h[:, 2:3]).solution
    expected = 1 - float(left.var() / h[:, 2].var())
    assert shares[2] == pytest.approx(expected, abs=1e-3)

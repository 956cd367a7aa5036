"""The training history: what is logged is what was, it survives the file, and a broken file changes nothing."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from tracker import NeuronEngine, StatisticsError, UnknownNeuronError


def trained(epochs: int = 3) -> tuple[NeuronEngine, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    engine = NeuronEngine()
    engine.track_model(model, "history")
    outputs = []
    for epoch in range(epochs):
        engine.start_tracking()
        outputs.append(model[0](torch.randn(20, 4) + epoch).detach())
        engine.stop_tracking()
        engine.log_epoch_statistics(epoch, 1.0 / (epoch + 1), torch.tensor(0.1 * epoch))
    return engine, model, outputs


def test_the_history_holds_what_was_seen() -> None:
    engine, _model, outputs = trained()
    e = engine.get_neuron_evolution(neuron_id=1)
    assert e["epochs"] == [0, 1, 2]
    assert e["loss"] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert e["accuracy"] == pytest.approx([0.0, 0.1, 0.2])
    assert e["mean"] == pytest.approx([float(y[:, 1].mean()) for y in outputs], rel=1e-5)
    assert e["variance"] == pytest.approx(
        [float(y[:, 1].var(correction=0)) for y in outputs], rel=1e-5
    )
    # The second layer was never called: its epochs are there, its values are null.
    assert engine.get_neuron_evolution(3)["mean"] == [None, None, None]


def test_the_file_round_trip(tmp_path: Path) -> None:
    engine, _model, _ = trained()
    path = engine.save_training_history(tmp_path / "logs" / "history.json")
    fresh = NeuronEngine()  # without any model
    fresh.load_training_history(path)
    for neuron in range(5):
        assert fresh.get_neuron_evolution(neuron) == engine.get_neuron_evolution(neuron)
    again = fresh.save_training_history(tmp_path / "again.json")
    assert again.read_text() == path.read_text()
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["history.json"]


def test_the_file_has_the_shape_of_the_brief(tmp_path: Path) -> None:
    engine, _model, _ = trained()
    data = json.loads(engine.save_training_history(tmp_path / "h.json").read_text())
    assert data["metadata"]["total_epochs"] == 3
    assert data["metadata"]["total_neurons"] == 5
    assert data["metadata"]["activation_threshold"] == 0.01
    assert {"mean", "variance", "frequency", "loss", "accuracy"} <= set(
        data["neuron_histories"]["0"]
    )
    schema = json.loads((files("tracker") / "schemas" / "training_history.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)


def edits() -> dict[str, Any]:
    """Ways to spoil a valid history file."""

    def put(*path: Any, value: Any) -> Any:
        def edit(data: dict[str, Any]) -> dict[str, Any]:
            at: Any = data
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            return data

        return edit

    def drop(*path: Any) -> Any:
        def edit(data: dict[str, Any]) -> dict[str, Any]:
            at: Any = data
            for key in path[:-1]:
                at = at[key]
            del at[path[-1]]
            return data

        return edit

    neuron = ("neuron_histories", "0")
    return {
        "future schema": put("schema_version", value="2.0"),
        "no schema": drop("schema_version"),
        "no metadata": drop("metadata"),
        "metadata a list": put("metadata", value=[]),
        "epochs do not add up": put("metadata", "total_epochs", value=4),
        "neurons do not add up": drop("neuron_histories", "1"),
        "short series": put(*neuron, "mean", value=[1.0]),
        "text for a number": put(*neuron, "mean", value=["a", "b", "c"]),
        "a boolean for a number": put(*neuron, "mean", value=[True, 1, 2]),
        "unknown epoch": put(*neuron, "epochs", value=[0, 1, 7]),
        "epochs out of order": put(*neuron, "epochs", value=[2, 1, 0]),
        "negative id": lambda d: {**d, "neuron_histories": {"-1": d["neuron_histories"]["0"]}},
        "id no number": lambda d: {**d, "neuron_histories": {"x": 1}},
        "missing series": drop(*neuron, "variance"),
        "loss too long": put("metadata", "loss", value=[1] * 9),
        "a list": lambda d: [d],
        "null": lambda d: None,
    }


@pytest.mark.parametrize("name", edits())
def test_a_spoilt_file_changes_nothing(name: str, tmp_path: Path) -> None:
    engine, _model, _ = trained()
    before = engine.get_neuron_evolution(0)
    path = engine.save_training_history(tmp_path / "h.json")
    path.write_text(json.dumps(edits()[name](json.loads(path.read_text()))))
    with pytest.raises(StatisticsError, match=r"history|epoch"):
        engine.load_training_history(path)
    assert engine.get_neuron_evolution(0) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2", "not json", "NaN", '{"a": NaN}', "[" * 100_000, "\x00\xff"]
)
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StatisticsError, match=r"JSON|training history"):
        NeuronEngine().load_training_history(path)


def test_missing_files_and_folders() -> None:
    with pytest.raises(StatisticsError, match="No such file"):
        NeuronEngine().load_training_history("nowhere.json")
    with pytest.raises(StatisticsError, match="Cannot read"):
        NeuronEngine().load_training_history(".")


def test_unknown_neurons_and_empty_histories() -> None:
    engine, _model, _ = trained()
    with pytest.raises(UnknownNeuronError, match="no neuron 99"):
        engine.get_neuron_evolution(99)
    with pytest.raises(UnknownNeuronError, match="log_epoch_statistics"):
        NeuronEngine().get_neuron_evolution(0)
    with pytest.raises(StatisticsError, match="empty"):
        NeuronEngine().plot_evolution()


def test_losses_that_are_not_finite_become_null(tmp_path: Path) -> None:
    engine, model, _ = trained(epochs=1)
    engine.start_tracking()
    model(torch.randn(5, 4))
    engine.log_epoch_statistics(1, float("nan"), None)
    path = engine.save_training_history(tmp_path / "h.json")
    assert "NaN" not in path.read_text()
    engine.load_training_history(path)
    assert engine.get_neuron_evolution(0)["loss"] == [1.0, None]
    engine.plot_evolution(tmp_path / "evolution.png")


def test_each_model_has_its_history() -> None:
    engine, first, _ = trained()
    second = nn.Sequential(nn.Linear(4, 2))
    engine.track_model(second, "second")
    with pytest.raises(UnknownNeuronError):
        engine.get_neuron_evolution(0)
    engine.register_activation_hooks(first)
    assert len(engine.get_neuron_evolution(0)["epochs"]) == 3


def test_a_history_loaded_first_goes_on_with_the_model(tmp_path: Path) -> None:
    engine, _, _ = trained(epochs=2)
    path = engine.save_training_history(tmp_path / "h.json")
    resumed = NeuronEngine()
    resumed.load_training_history(path)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    resumed.track_model(model)
    resumed.start_tracking()
    model(torch.randn(5, 4))
    resumed.log_epoch_statistics(2, 0.1, 0.9)
    assert resumed.get_neuron_evolution(0)["epochs"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("epoch", "loss", "accuracy"),
    [(1.0, 1, 1), ("one", 1, 1), (None, 1, 1), (1, "low", 1), (1, 1, [1, 2])],
)
def test_what_could_not_be_saved_is_not_logged(
    epoch: object, loss: object, accuracy: object
) -> None:
    engine, model, _ = trained(epochs=1)
    engine.start_tracking()
    model(torch.randn(5, 4))
    with pytest.raises(StatisticsError, match="cannot be logged"):
        engine.log_epoch_statistics(epoch, loss, accuracy)
    assert engine.get_neuron_evolution(0)["epochs"] == [0]
    engine.log_epoch_statistics(torch.tensor(1), torch.tensor(0.5), 1)
    assert engine.get_neuron_evolution(0)["epochs"] == [0, 1]

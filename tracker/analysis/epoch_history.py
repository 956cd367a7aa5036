"""What every neuron did, epoch by epoch, beside loss and accuracy; as JSON, and back."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tracker.errors import StatisticsError, UnknownNeuronError
from tracker.observation.records import Observation
from tracker.utils.files import read_whole, write_whole

SCHEMA_VERSION = "1.0"
SERIES = ("mean", "variance", "frequency", "loss", "accuracy")
_MAX_BYTES = 1 << 30

Number = float | None


@dataclass(frozen=True, slots=True)
class Epoch:
    """One logged epoch. Each neuron's entry is (mean, variance, firing frequency); None if not observed."""

    epoch: int
    loss: Number
    accuracy: Number
    neurons: Mapping[int, tuple[Number, Number, Number]]


@dataclass(slots=True)
class TrainingHistory:
    """The logged epochs of one model, in order."""

    activation_threshold: float
    epochs: list[Epoch] = field(default_factory=list)
    layers: dict[int, tuple[str, int]] = field(default_factory=dict)  # id → (layer, local index)

    def log(self, observation: Observation, epoch: int, loss: Number, accuracy: Number) -> Epoch:
        """Add an epoch from the statistics of one window.

        Raises:
            StatisticsError: The epoch is no integer, or loss or accuracy no number.
        """
        try:
            epoch, loss, accuracy = operator.index(epoch), _finite(loss), _finite(accuracy)
        except (TypeError, ValueError) as error:
            raise StatisticsError(
                f"Epoch {epoch!r} with loss {loss!r} and accuracy {accuracy!r} cannot be logged: an epoch is an "
                "integer, loss and accuracy are numbers or None."
            ) from error
        neurons: dict[int, tuple[Number, Number, Number]] = {}
        for layer in observation.layers:
            a = layer.activity
            columns = (a.mean.tolist(), a.variance.tolist(), a.firing_frequency.tolist())
            rows = zip(*columns, strict=True)
            neurons.update(
                {
                    n: tuple(map(_finite, row))  # type: ignore[misc]
                    for n, row in zip(layer.ids, rows, strict=True)
                }
            )
            self.layers.update({n: (layer.name, i) for i, n in enumerate(layer.ids)})
        entry = Epoch(epoch, loss, accuracy, neurons)
        self.epochs.append(entry)
        return entry

    def copy(self) -> TrainingHistory:
        """The same epochs, in objects of its own."""
        epochs = [replace(epoch, neurons=dict(epoch.neurons)) for epoch in self.epochs]
        return replace(self, epochs=epochs, layers=dict(self.layers))

    def evolution(self, neuron_id: int) -> dict[str, list[Any]]:
        """Lists of equal length over the epochs in which the neuron lived: `epochs` and the five series.

        Raises:
            UnknownNeuronError: The history has no neuron of this id.
        """
        lived = [e for e in self.epochs if neuron_id in e.neurons]
        if not lived:
            raise UnknownNeuronError(
                f"The history has no neuron {neuron_id!r}. It holds {len(self.epochs)} epochs"
                + (". Log some with log_epoch_statistics." if not self.epochs else ".")
            )
        mean, variance, frequency = zip(*(e.neurons[neuron_id] for e in lived), strict=True)
        return {
            "epochs": [e.epoch for e in lived],
            "mean": list(mean),
            "variance": list(variance),
            "frequency": list(frequency),
            "loss": [e.loss for e in lived],
            "accuracy": [e.accuracy for e in lived],
        }

    def to_dict(self) -> dict[str, Any]:
        """The history as the JSON Schema `tracker/schemas/training_history.json` describes it."""
        ids = sorted({n for e in self.epochs for n in e.neurons})
        histories = {}
        for n in ids:
            layer, index = self.layers.get(n, ("", 0))
            histories[str(n)] = {"layer_name": layer, "local_index": index} | self.evolution(n)
        return {
            "schema_version": SCHEMA_VERSION,
            "metadata": {
                "total_epochs": len(self.epochs),
                "total_neurons": len(ids),
                "activation_threshold": self.activation_threshold,
                "epochs": [e.epoch for e in self.epochs],
                "loss": [e.loss for e in self.epochs],
                "accuracy": [e.accuracy for e in self.epochs],
            },
            "neuron_histories": histories,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the history as JSON: whole, or not at all.

        Raises:
            WriteError: It cannot be written.
        """
        return write_json(path, self.to_dict(), indent=None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingHistory:
        """Read a history back.

        Raises:
            StatisticsError: The file is missing, broken, or not a history; the message says what is wrong with it.
        """
        return cls.from_dict(read_json(path), os.fspath(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "this") -> TrainingHistory:
        """A history from what `to_dict` gave.

        Raises:
            StatisticsError: It is not a history; the message says what is wrong with it.
        """
        try:
            return _parse(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StatisticsError(
                f"{source!r} is not a training history: {_reason(error)}. "
                "Expected is a file written by save_training_history."
            ) from error


def write_json(
    path: str | os.PathLike[str], data: Mapping[str, Any], indent: int | None = 2
) -> Path:
    """Write JSON without NaN, replacing the file only once it is complete.

    Raises:
        WriteError: It cannot be written.
    """
    return write_whole(path, (json.dumps(data, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parsed JSON of a file of sane size.

    Raises:
        StatisticsError: It cannot be read.
    """
    try:
        data = read_whole(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise StatisticsError(f"Cannot read {os.fspath(path)!r}: {why or error}.") from error
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"{os.fspath(path)!r} is not valid JSON: {error}.") from error


def _parse(data: Any) -> TrainingHistory:
    version = str(data["schema_version"])
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(f"its schema version is {version}, this library reads {SCHEMA_VERSION}")
    meta = data["metadata"]
    numbers = [_integer(e) for e in meta["epochs"]]
    losses, accuracies = (
        _numbers(meta["loss"], len(numbers)),
        _numbers(meta["accuracy"], len(numbers)),
    )
    _require(meta["total_epochs"] == len(numbers), "total_epochs does not match its epochs")
    _require(meta["total_neurons"] == len(data["neuron_histories"]), "total_neurons does not match")
    history = TrainingHistory(float(_number(meta["activation_threshold"]) or 0.0))
    rows: list[dict[int, tuple[Number, Number, Number]]] = [{} for _ in numbers]
    for key, entry in data["neuron_histories"].items():
        neuron = int(key)
        _require(neuron >= 0, f"{key!r} is no neuron id")
        name, index = entry["layer_name"], _integer(entry["local_index"])
        _require(isinstance(name, str) and index >= 0, f"{key} has no place")
        history.layers[neuron] = (name, index)
        series = list(zip(losses, accuracies, strict=True))
        for position, row, told in _placed(entry, numbers):
            _require(told == series[position], f"{key} has another loss or accuracy than its epoch")
            rows[position][neuron] = row
    history.epochs = [
        Epoch(*values) for values in zip(numbers, losses, accuracies, rows, strict=True)
    ]
    return history


Row = tuple[int, tuple[Number, Number, Number], tuple[Number, Number]]


def _placed(entry: Any, numbers: Sequence[int]) -> list[Row]:
    """A neuron's rows with the positions of their epochs: its epochs are a subsequence of the run's."""
    lived = [_integer(e) for e in entry["epochs"]]
    columns = [_numbers(entry[name], len(lived)) for name in SERIES]
    positions, at = [], -1
    for epoch in lived:
        at = numbers.index(epoch, at + 1)
        positions.append(at)
    own, told = zip(*columns[:3], strict=True), zip(*columns[3:], strict=True)
    return list(zip(positions, own, told, strict=True))


def _numbers(values: Any, count: int) -> list[Number]:
    _require(isinstance(values, list) and len(values) == count, f"a series has not {count} entries")
    return [_number(v) for v in values]


def _number(value: Any) -> Number:
    ok = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    _require(ok and (value is None or math.isfinite(value)), f"{value!r} is no number")
    result: float | None = value
    return result


def _integer(value: Any) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool), f"{value!r} is no integer")
    return int(value)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(value: Any) -> Number:
    """A JSON number: tensors and NumPy scalars become floats, what is not finite becomes null."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None

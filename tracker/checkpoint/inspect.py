"""What lies on the disk, for people: checkpoints, journals, histories and recommendations, shown, compared, checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracker.analysis.epoch_history import TrainingHistory
from tracker.checkpoint.checkpoint_files import Checkpoint, read_checkpoint, read_text
from tracker.checkpoint.run_state import PASSING
from tracker.errors import CheckpointError, TrackerError
from tracker.journal import Journal, fingerprint_of
from tracker.utils.json_schema import load_schema, problems
from tracker.utils.text import in_line

SCHEMAS = {
    "journal": "journal.schema.json",
    "history": "training_history.json",
    "recommendations": "optimization_recommendations.json",
}
MOST = 20  # lines of one sort


@dataclass(frozen=True, slots=True)
class Found:
    """What a path holds. kind: "checkpoint", "journal", "history" or "recommendations"."""

    path: str
    kind: str
    data: Any


def find(path: str | os.PathLike[str]) -> Found:
    """What is at a path, once it is found to be whole.

    Raises:
        TrackerError: It is none of ours, or it is damaged; the message says what is wrong.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        content = read_checkpoint(path)
        with _readable(name):
            _check_checkpoint(content, name)
            list(_show_checkpoint(content))
        return Found(name, "checkpoint", content)
    data = read_text(path)
    kind = _kind(data)
    if kind is None:
        raise CheckpointError(
            f"{name} is no journal, history or set of recommendations of this library."
        )
    _check(data, kind, name)
    return Found(name, kind, data)


def shown(found: Found) -> str:
    """A report for people."""
    return "\n".join(map(in_line, _SHOW[found.kind](found.data)))


def differences(one: Found, other: Found) -> list[str]:
    """How two of a kind differ; nothing if they say the same.

    Raises:
        CheckpointError: They are of different kinds.
    """
    if one.kind != other.kind:
        raise CheckpointError(
            f"{one.path} is a {one.kind} and {other.path} a {other.kind}: they cannot be compared."
        )
    if one.kind == "checkpoint":
        found = _between_checkpoints(one.data, other.data)
    elif one.kind == "journal":
        found = _between_journals(one.data, other.data)
    else:
        found = _between(one.data, other.data, "")
    return list(map(in_line, found))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, TrackerError):
            raise
        raise CheckpointError(
            f"{name} is not what a checkpoint is: {type(error).__name__}: {error}"
        ) from error


def _kind(data: Any) -> str | None:
    if isinstance(data, dict):
        if "entries" in data:
            return "journal"
        if "neuron_histories" in data:
            return "history"
        if {"prune", "merge", "expand"} <= set(data):
            return "recommendations"
    return None


def _check(data: Any, kind: str, name: str) -> None:
    wrong = next(problems(data, load_schema(SCHEMAS[kind])), None)
    if kind == "journal":  # first: it knows of versions
        Journal.from_dict(data)
    if wrong is not None:
        raise CheckpointError(f"The {kind} in {name} is not as its schema says: {wrong}.")
    if kind == "history":
        TrainingHistory.from_dict(data, name)


def _check_checkpoint(content: Checkpoint, name: str) -> None:
    engine = content.texts["engine"]
    _check(content.texts["journal"], "journal", f"{name}/journal.json")
    journal = Journal.from_dict(content.texts["journal"])
    needed = ("name", "registry", "aliases", "optimizers", "settings", "samples")
    if not isinstance(engine, dict) or any(key not in engine for key in needed):
        raise CheckpointError(f"{name}/engine.json lacks what a checkpoint has.")
    if engine.get("history") is not None:
        _check(engine["history"], "history", f"{name}/engine.json")
    try:
        print_ = fingerprint_of(_weights(content))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: a tied weight is not there: {error}.") from error
    if len(journal) and print_ != journal[-1].after:
        raise CheckpointError(
            f"{name}: the weights are not of the shapes that its journal ends with."
        )


def _weights(content: Checkpoint) -> dict[str, torch.Tensor]:
    own = {k: v for k, v in content.tensors["model"].items() if not k.startswith(PASSING)}
    aliases = content.texts["engine"]["aliases"]
    return own | {name: content.tensors["model"][target] for name, target in aliases.items()}


def _show_checkpoint(content: Checkpoint) -> Iterator[str]:
    engine = content.texts["engine"]
    weights = content.tensors["model"]
    numbers = sum(t.numel() for k, t in weights.items() if not k.startswith(PASSING))
    layers = engine["registry"]["layers"]
    gone = len(engine["registry"]["gone"])
    yield f"Checkpoint of {engine['name']!r}"
    yield f"  numbers in parameters and buffers: {numbers:,} in {len(weights)} tensors"
    yield f"  neurons: {sum(map(len, layers.values())):,} in {len(layers)} layers; {gone:,} have left"
    for name, ids in list(layers.items())[:MOST]:
        yield f"    {name}: {len(ids)}"
    if len(layers) > MOST:
        yield f"    and {len(layers) - MOST} more"
    for optimizer in engine["optimizers"]:
        rates = [group["options"].get("lr") for group in optimizer["groups"]]
        yield f"  optimizer: {optimizer['class']}, learning rate {', '.join(map(str, rates))}"
    samples = sum(engine["samples"].values())
    yield f"  observed in the window: {samples:,} samples"
    if engine["history"] is not None:
        yield from (f"  {line}" for line in _show_history(engine["history"]))
    yield from (f"  {line}" for line in _show_journal(content.texts["journal"]))


def _show_journal(data: Any) -> Iterator[str]:
    journal = Journal.from_dict(data)
    yield f"Journal of {len(journal)} change{'s' * (len(journal) != 1)}"
    yield from (f"  {line}" for line in str(journal).splitlines())


def _show_history(data: Any) -> Iterator[str]:
    meta = data["metadata"]
    yield f"History of {meta['total_neurons']} neurons over {meta['total_epochs']} epochs"
    rows = zip(meta["epochs"], meta["loss"], meta["accuracy"], strict=True)
    for epoch, loss, accuracy in list(rows)[-MOST:]:
        yield f"  epoch {epoch}: loss {_text(loss)}, accuracy {_text(accuracy)}"


def _show_recommendations(data: Any) -> Iterator[str]:
    info = data["metadata"]["model_info"]
    yield f"Recommendations for {info['model_name']!r}, {info['total_neurons']} neurons"
    yield f"  seen: {data['metadata']['samples']:,} samples, mode {data['metadata']['mode']}"
    for what in ("prune", "merge", "expand"):
        yield f"  {what}: {len(data[what])}"
        for each in data[what][:MOST]:
            text = ", ".join(f"{k} {v}" for k, v in each.items() if not isinstance(v, dict))
            yield f"    {text}"
        if len(data[what]) > MOST:
            yield f"    and {len(data[what]) - MOST} more"


_SHOW: Mapping[str, Any] = {
    "checkpoint": _show_checkpoint,
    "journal": _show_journal,
    "history": _show_history,
    "recommendations": _show_recommendations,
}


def _between_checkpoints(one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    yield from _between_journals(one.texts["journal"], other.texts["journal"])
    for table in one.tensors:
        mine, theirs = one.tensors[table], other.tensors[table]
        for name in sorted({*mine, *theirs}):
            if name not in theirs or name not in mine:
                yield f"{table}: {name} is only in the {'first' if name in mine else 'second'}"
            elif mine[name].shape != theirs[name].shape or mine[name].dtype != theirs[name].dtype:
                a, b = mine[name], theirs[name]
                yield f"{table}: {name} {tuple(a.shape)} {a.dtype} -> {tuple(b.shape)} {b.dtype}"
            elif not _equal(mine[name], theirs[name]):
                gap = (mine[name].double() - theirs[name].double()).abs().max()
                yield f"{table}: {name} differs by up to {float(gap):.3g}"
    yield from _between(one.texts["engine"], other.texts["engine"], "engine")


def _between_journals(one: Any, other: Any) -> Iterator[str]:
    a, b = Journal.from_dict(one), Journal.from_dict(other)
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    if same < max(len(a), len(b)):
        yield f"journal: the first {same} changes are the same"
        yield from (f"journal: only in the first: {entry}" for entry in a.entries[same:])
        yield from (f"journal: only in the second: {entry}" for entry in b.entries[same:])


def _between(one: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            place = f"{where}.{key}" if where else key
            if key not in one or key not in other:
                yield f"{place} is only in the {'first' if key in one else 'second'}"
            else:
                yield from _between(one[key], other[key], place)
    elif one != other:
        yield f"{where}: {_text(one)} -> {_text(other)}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and bool(torch.allclose(a, b, 0, 0, True)))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)} entries]"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) < 80 else text[:77] + "..."

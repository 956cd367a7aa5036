"""What a training run is made of, gathered into a checkpoint and given back: bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.analysis.epoch_history import TrainingHistory
from tracker.checkpoint.checkpoint_files import Checkpoint
from tracker.checkpoint.optimizer_states import gather_optimizers
from tracker.checkpoint.random_states import gather_noise
from tracker.errors import CheckpointError, TrackerError
from tracker.inputs.serialized import calls_from, gather_calls, gather_inputs, inputs_from
from tracker.journal import Journal, load_architecture, meta_model_after, persistent_tensors
from tracker.observation.consumer_inputs import ConsumerInput, Sensitivity
from tracker.observation.hooks import LayerStatistics, ObservationPoint
from tracker.statistics import Activity, ActivityStream, Covariance, CovarianceStream
from tracker.statistics.activity import MEAN, ROWS
from tracker.structure import ReadPoint
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery.undo import UndoLog
from tracker.tracker import ActivationTracker, TrackedModel

MODES = {"train": True, "eval": False}
BENT = "curvature*"  # and the dimension of the weight along its outputs
PASSING = "passing/"  # buffers that are in no state dict


def dump_state(
    tracker: ActivationTracker,
    optimizers: Sequence[Optimizer],
    history: TrainingHistory,
    journal: Journal,
    settings: Mapping[str, Any],
    run: tuple[Mapping[str, Any] | None, Mapping[str, ConsumerInput], Mapping[str, Tensor]] = (
        None,
        {},
        {},
    ),
) -> Checkpoint:
    """All of it, as tables of tensors and plain data. run: of one that modifies itself, and what it observed."""
    entry = tracker.current
    model, observer = entry.model(), entry.observer
    weights, aliases = _untied(model)
    states, groups = gather_optimizers(model, optimizers)
    noise, generators = gather_noise()
    inputs, places = gather_inputs(observer.inputs)
    engine = {
        "name": entry.name,
        "settings": dict(settings),
        "registry": tracker.registry.to_dict(entry.layers),
        "sites": {point.name: _facts(point) for point in observer.points},
        "by_hand": sorted(entry.by_hand),
        "batch_dim": observer.batch_dim,
        "hooked": entry.hooked,
        "traced": entry.traced,
        "recording": observer.recording,
        "inputs": places,
        "calls": None if places is None else gather_calls(observer.given, model, inputs),
        "unread": list(observer.unread),
        "run": run[0],
        "samples": {str(int(flag)): n for flag, n in observer.samples.items()},
        "passes": {str(int(flag)): n for flag, n in observer.passes.items()},
        "correlated": entry.correlated,
        "every": observer.every,
        "sampling": observer.sampling,
        "chosen": None if observer.chosen is None else sorted(observer.chosen),
        "mode": entry.mode,
        "history": history.to_dict() if history.epochs else None,
        "aliases": aliases,
        "optimizers": groups,
        "random": generators,
        "training": [name for name, module in model.named_modules() if module.training],
        "strides": {
            name: list(t.stride())
            for name, t in tensors(model).items()
            if t.stride() != torch.empty(t.shape, device="meta").stride()
        },
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
    }
    return Checkpoint(
        {
            "model": weights,
            "optimizer": states,
            "statistics": {**_seen(tracker), **reads_tables("run", run[1]), **run[2], **inputs},
            "random": noise,
        },
        {"journal": journal.to_dict(), "engine": engine},
    )


def load_model(model: nn.Module, content: Checkpoint, log: UndoLog) -> Journal:
    """Give a freshly built model the architecture and the weights of the checkpoint; all or nothing, by the log.

    Raises:
        CheckpointError: It is not the model that was saved.
    """
    journal = Journal.from_dict(content.texts["journal"])
    meta_model = meta_model_after(
        model, journal, sum(t.numel() for t in content.tensors["model"].values())
    )
    values = _values(meta_model, content)
    load_architecture(model, meta_model, values, *journal.places, log)
    modules = dict(model.named_modules())
    parameters = list(model.named_parameters())
    flags = {name: module.training for name, module in modules.items()}
    learns = [p.requires_grad for _, p in parameters]

    def back() -> None:
        for name, flag in flags.items():
            modules[name].training = flag
        for (_, parameter), flag in zip(parameters, learns, strict=True):
            parameter.requires_grad_(flag)

    log.add(back)
    training = set(_part(content, "training", list))
    frozen = set(_part(content, "frozen", list))
    for name, module in modules.items():
        module.training = name in training
    for name, parameter in parameters:
        parameter.requires_grad_(name not in frozen)
    return journal


def _values(meta_model: nn.Module, content: Checkpoint) -> dict[str, Tensor]:
    """The saved tensors under all their names, once they are found to be those of the twin."""
    saved = {n: t for n, t in content.tensors["model"].items() if not n.startswith(PASSING)}
    aliases = _part(content, "aliases", dict)
    for name, target in aliases.items():
        if target not in content.tensors["model"] or name in saved:
            raise CheckpointError(f"{name} is said to be {target!r}, which is not there.")
        saved[name] = content.tensors["model"][target]
    own = persistent_tensors(meta_model)
    if set(own) != set(saved):
        odd = sorted(set(own) ^ set(saved))
        raise CheckpointError(
            f"The checkpoint is of another model: {odd[0]!r} is only in one of the two ({len(odd)} such names)."
        )
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"The checkpoint is of another model: {name} is {tuple(tensor.shape)} {tensor.dtype} and was "
                f"{tuple(saved[name].shape)} {saved[name].dtype}."
            )
    first: dict[int, str] = {}
    for name, tensor in own.items():
        if first.setdefault(id(tensor), name) != aliases.get(name, name):
            raise CheckpointError(
                f"The checkpoint is of another model: {name} is tied to {first[id(tensor)]}, and was to "
                f"{aliases.get(name, 'nothing')}, or the other way round."
            )
    # Caches of a forward pass: those of the same shape; others will be made again.
    for name, tensor in tensors(meta_model).items():
        value = content.tensors["model"].get(PASSING + name)
        if value is not None and name not in own and value.shape == tensor.shape:
            saved[name] = value.to(tensor.dtype)
    # As they lay in memory: kernels round by that.
    for name, strides in _part(content, "strides", dict).items():
        if name in saved:
            saved[name] = laid_out(saved[name], tuple(map(_whole, strides)))
    return saved


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values with these strides in memory.

    Raises:
        CheckpointError: A tensor of this shape cannot have them.
    """
    order = sorted(zip(strides, value.shape, strict=True))
    place = 1
    for stride, size in order:
        if size > 1 and stride != place:
            raise CheckpointError(f"A tensor of {tuple(value.shape)} cannot lie at {strides}.")
        place *= size
    return torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)


def require_ids(journal: Journal, registry: Mapping[str, Any]) -> None:
    """The neurons that a journal speaks of are those of the registry.

    Raises:
        CheckpointError: They are not.
    """
    gone = set(registry["gone"])
    known = gone | {str(i) for ids in registry["layers"].values() for i in ids}
    added: set[int] = set()
    for entry in journal:
        twice = added.intersection(entry.added_ids)
        added.update(entry.added_ids)
        if twice or not (
            known.issuperset(map(str, entry.added_ids))
            and gone.issuperset(map(str, entry.removed_ids))
        ):
            raise CheckpointError(
                f"Entry {entry.number} of the journal speaks of other neurons than the registry of ids."
            )


def load_tracker(
    tracker: ActivationTracker, model: nn.Module, content: Checkpoint
) -> tuple[TrainingHistory | None, dict[str, ConsumerInput]]:
    """Track a model, and give the tracker back its ids and statistics; its history, and what a run had observed.

    Raises:
        CheckpointError: They do not fit the model.
    """
    facts, points = content.texts["engine"], _part(content, "sites", dict)
    try:
        axes = {name: _whole(points[name]["axis"]) for name in facts["by_hand"]}
        entry = tracker.track(model, str(facts["name"]), None, axes, _whole(facts["batch_dim"]))
        observer = entry.observer
        if {point.name for point in observer.points} != set(points):
            raise ValueError("it observed other layers than the model has")
        for point in observer.points:
            _place(point, points[point.name], model)
        _give_ids(tracker, entry, facts["registry"])
        tables = content.tensors["statistics"]
        observer.inputs = inputs_from(tables, facts["inputs"])
        observer.given = calls_from(tables, facts.get("calls"), observer.inputs, model)
        observer.unread = tuple(map(_name, facts.get("unread", ())))
        observer.samples = {bool(int(k)): _whole(n) for k, n in facts["samples"].items()}
        observer.passes = {bool(int(k)): _whole(n) for k, n in facts.get("passes", {}).items()}
        entry.correlated = observer.correlate = bool(facts["correlated"])
        observer.every, chosen = max(1, _whole(facts.get("every", 1))), facts.get("chosen")
        observer.sampling = max(1, _whole(facts.get("sampling", 1)))
        observer.chosen = None if chosen is None else frozenset(map(str, chosen))
        if facts["mode"] not in (*MODES, "all", None):
            raise ValueError(f"{facts['mode']!r} is no mode")
        entry.mode, entry.traced = facts["mode"], bool(facts["traced"])
        if facts["hooked"]:
            tracker.hook()
        elif observer.inputs is not None:
            entry.detach()  # nothing has to be waited for at the model's door
        seen = restore_seen(tracker, content.tensors["statistics"])
        observer.recording = bool(facts["recording"] and facts["hooked"])
        history = facts["history"]
        return None if history is None else TrainingHistory.from_dict(history), seen
    except TrackerError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The engine's part of the checkpoint cannot be read: {error}"
        ) from error


def _place(point: ObservationPoint, facts: Mapping[str, Any], model: nn.Module) -> None:
    neurons, axis = facts["neurons"], facts["axis"]
    if neurons is not None:
        neurons, axis = _whole(neurons), _whole(axis)
        if point.neurons not in (None, neurons):
            raise ValueError(f"{point.name} has {point.neurons} neurons, and not {neurons}")
        point.neurons, point.axis = neurons, axis
    if facts["tap"] is not None:
        module, along, positions, reader = facts["tap"]
        model.get_submodule(module), model.get_submodule(reader)
        point.read_point = ReadPoint(module, _whole(along), _whole(positions), reader)
    point.is_output, point.stopped = bool(facts["is_output"]), bool(facts["stopped"])
    point.problem = str(facts["problem"])


def _give_ids(tracker: ActivationTracker, entry: TrackedModel, data: Mapping[str, Any]) -> None:
    layers = tracker.registry.restore_from(data, entry.name)
    widths = {
        point.name: point.neurons for point in entry.observer.points if point.neurons is not None
    }
    if {name: len(layer.ids) for name, layer in layers.items()} != widths:
        raise ValueError("layers have other widths")
    entry.layers = layers


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the other names of those that have several."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{name or 'The model'} keeps an extra state beside its tensors: it cannot be saved."
            )
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    own = persistent_tensors(model)
    for name, tensor in own.items():
        if (target := first.setdefault(id(tensor), name)) != name:
            aliases[name] = target
        else:
            weights[name] = tensor.detach().clone()
    for name, tensor in tensors(model).items():
        if name not in own:
            weights[PASSING + name] = tensor.detach().clone()
    return weights, aliases


def _facts(point: ObservationPoint) -> dict[str, Any]:
    read_point = point.read_point
    return {
        "neurons": point.neurons,
        "axis": point.axis,
        "tap": None
        if read_point is None
        else [read_point.module, read_point.axis, read_point.positions, read_point.reader],
        "is_output": point.is_output,
        "problem": point.problem,
        "stopped": point.stopped,
    }


def _part(content: Checkpoint, key: str, kind: type) -> Any:
    facts = content.texts["engine"]
    part = facts.get(key) if isinstance(facts, dict) else None
    if not isinstance(part, kind):
        raise CheckpointError(f"The engine's part of the checkpoint has no {key!r}.")
    return part


def _seen(tracker: ActivationTracker) -> dict[str, Tensor]:
    """Statistics of the window, and what consumers were seen to read."""
    found: dict[str, Tensor] = {}
    for point in tracker.current.observer.points:
        for mode, flag in MODES.items():
            window = None if point.shares_with is not None else point.windows.get(flag)
            if window is not None:
                found[f"activity/{mode}/{point.name}"] = window.activity.value().table
                if window.covariance is not None:
                    found.update(
                        _parts(f"covariance/{mode}/{point.name}", window.covariance.value())
                    )
    return found | reads_tables("read", tracker.current.reads)


def reads_tables(kind: str, reads: Mapping[str, ConsumerInput]) -> dict[str, Tensor]:
    """What consumers read, as tensors that `restore_seen` takes; `kind` begins their names."""
    found: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, read in reads.items():
        parts = _parts(f"{kind}/{read.dim}*{read.kernel_positions}/{name}", read.covariance)
        if id(read.covariance) in written:  # what consumers share is written for each
            parts = {key: value.clone() for key, value in parts.items()}
        written.add(id(read.covariance))
        found.update(parts)
        if read.loss is not None:
            key = f"{kind}/{read.dim}*{read.kernel_positions}/{name}"
            found[f"{key}/{BENT}{read.loss.across}"] = read.loss.curvature
            if read.loss.slope is not None:
                found[f"{key}/slope"] = read.loss.slope
    return found


def _parts(key: str, value: Covariance) -> dict[str, Tensor]:
    return {
        f"{key}/count": value.count,
        f"{key}/mean": value.mean,
        f"{key}/comoment": value.comoment,
    }


def restore_seen(
    tracker: ActivationTracker, tables: Mapping[str, Tensor]
) -> dict[str, ConsumerInput]:
    """Give the statistics back; what a run had observed is returned."""
    entry = tracker.current
    reads: dict[str, dict[str, ConsumerInput]] = {"read": entry.reads, "run": {}}
    model = entry.model()
    points = {point.name: point for point in entry.observer.points}
    whole: dict[str, dict[str, Tensor]] = {}
    for key, value in tables.items():
        if key.startswith(("input.", "look.")):
            continue
        kind, mode, rest = key.split("/", 2)
        if kind == "activity":
            point = points[rest]
            _require_table(value, torch.float64, (ROWS, point.neurons), f"statistics of {rest}")
            _require_counts(value[:MEAN], rest)
            stream = ActivityStream.resumed(Activity(value.clone()), tracker.threshold)
            point.windows[MODES[mode]] = LayerStatistics(stream, None)
        else:
            name, _, part = rest.rpartition("/")
            whole.setdefault(f"{kind}/{mode}/{name}", {})[part] = value.clone()
    for key, parts in whole.items():
        kind, mode, name = key.split("/", 2)
        covariance = Covariance(parts["count"], parts["mean"], parts["comoment"])
        dim, _, kernel_positions = mode.partition("*")
        width = (
            tensors(model)[name].shape[int(dim)] * int(kernel_positions)
            if kind in ("read", "run")
            else points[name].neurons
        )
        what = f"the covariance of {name}"
        _require_table(covariance.count, torch.int64, (width,), what)
        _require_table(covariance.mean, torch.float64, (width,), what)
        _require_table(covariance.comoment, torch.float64, (width, width), what)
        _require_counts(covariance.count, name)
        if kind in ("read", "run"):
            loss = _sensitivity(parts, tensors(model)[name].shape, width or 0, name)
            reads[kind][name] = ConsumerInput(int(dim), covariance, int(kernel_positions), loss)
        else:
            points[name].windows[MODES[mode]].covariance = CovarianceStream.resumed(covariance)
    return reads["run"]


def _sensitivity(
    parts: Mapping[str, Tensor], shape: Sequence[int], columns: int, name: str
) -> Sensitivity | None:
    """How the loss depends on what a consumer of a weight of this shape puts out, where that was known."""
    key = next((key for key in parts if key.startswith(BENT)), None)
    if key is None:
        return None
    bent, across, slope = parts[key], int(key.removeprefix(BENT)), parts.get("slope")
    outputs = shape[across]
    _require_table(
        bent, torch.float64, (outputs,) * min(max(bent.ndim, 1), 2), f"the curvature of {name}"
    )
    if slope is not None and slope.numel():  # none of a loss that is the change itself
        rows = slope.shape[0] if slope.ndim and slope.shape[0] % outputs == 0 else outputs
        _require_table(slope, torch.float32, (rows, columns), f"the slope of {name}")
    return Sensitivity(bent, across, slope)


def _require_table(
    value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], what: str
) -> None:
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(f"{what} are {tuple(value.shape)} {value.dtype}, and not {shape} {dtype}")


def _require_counts(value: Tensor, name: str) -> None:
    if not bool(((value >= 0) & (value <= 2**53)).all()):
        raise ValueError(f"{name} was observed a number of times that is none")

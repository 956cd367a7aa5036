"""What a training run is made of, gathered into a checkpoint and given back: bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import CheckpointError, TrackerError
from tracker.history import TrainingHistory
from tracker.hooks import Window
from tracker.journal import Checkpoint, Journal
from tracker.statistics import Activity, ActivityStream, Covariance, CovarianceStream
from tracker.surgery.newborn import AGE, watch
from tracker.surgery.undo import UndoLog, writable
from tracker.tracker import ActivationTracker, Read

MODES = {"train": True, "eval": False}


def gather(
    tracker: ActivationTracker,
    optimizers: Sequence[Optimizer],
    history: TrainingHistory,
    journal: Journal,
    settings: Mapping[str, Any],
) -> Checkpoint:
    """All of it, as tables of tensors and plain data."""
    entry = tracker.current
    model = entry.model()
    weights, aliases = _untied(model)
    states, groups = _optimizers(model, optimizers)
    noise, generators = _generators()
    engine = {
        "name": entry.name,
        "settings": dict(settings),
        "registry": tracker.registry.to_dict(entry.layers),
        "samples": {str(int(flag)): n for flag, n in entry.observer.samples.items()},
        "correlated": entry.correlated,
        "mode": entry.mode,
        "history": history.to_dict() if history.epochs else None,
        "aliases": aliases,
        "optimizers": groups,
        "random": generators,
        "training": [name for name, module in model.named_modules() if module.training],
    }
    return Checkpoint(
        {"model": weights, "optimizer": states, "statistics": _seen(tracker), "random": noise},
        {"journal": journal.to_dict(), "engine": engine},
    )


def load_model(model: nn.Module, content: Checkpoint, log: UndoLog) -> Journal:
    """Give a freshly built model the shapes and the weights of the checkpoint; all or nothing, by the log.

    Raises:
        CheckpointError: It is not the model that was saved.
    """
    journal = Journal.from_dict(content.texts["journal"])
    log.add(journal.replay(model).undo)
    saved = dict(content.tensors["model"])
    aliases = _table(content, "aliases")
    for name, target in aliases.items():
        if target not in saved:
            raise CheckpointError(f"{name} is said to be {target!r}, which is not there.")
        saved[name] = saved[target]
    own = model.state_dict(keep_vars=True)
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
    with writable():
        for name, tensor in own.items():
            _swap(tensor, saved[name], log)
    modules = dict(model.named_modules())
    flags = {name: module.training for name, module in modules.items()}

    def back() -> None:
        for name, flag in flags.items():
            modules[name].training = flag

    log.add(back)
    training = set(content.texts["engine"].get("training", ()))
    for name, module in modules.items():
        module.training = name in training
    return journal


def load_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer], content: Checkpoint, log: UndoLog
) -> None:
    """Give optimizers back what they knew of the model's parameters.

    Raises:
        CheckpointError: There are others than were saved, or they hold other parameters.
    """
    saved = content.texts["engine"]["optimizers"]
    if not optimizers:
        return
    if len(saved) != len(optimizers):
        raise CheckpointError(f"{len(saved)} optimizers were saved, and {len(optimizers)} given.")
    parameters = dict(model.named_parameters())
    states: dict[tuple[int, str], dict[str, Any]] = {}
    for key, value in content.tensors["optimizer"].items():
        place, _, rest = key.partition("/")
        name, _, what = rest.rpartition("/")
        states.setdefault((int(place), name), {})[what] = value.clone()
    for number, (optimizer, facts) in enumerate(zip(optimizers, saved, strict=True)):
        if facts["class"] != type(optimizer).__name__:
            raise CheckpointError(
                f"The optimizer was a {facts['class']} and is a {type(optimizer).__name__}."
            )
        if len(facts["groups"]) != len(optimizer.param_groups):
            raise CheckpointError("The optimizer has another number of parameter groups.")
        fresh: dict[Any, dict[str, Any]] = {}
        for name, numbers in facts["numbers"].items():
            if name not in parameters:
                raise CheckpointError(f"The optimizer knew {name}, which the model does not have.")
            fresh.setdefault(parameters[name], {}).update(numbers)
        for (n, name), values in states.items():
            if n == number:
                target = parameters[name]
                device = target.device
                moved = {k: v if k == "step" else v.to(device) for k, v in values.items()}
                fresh.setdefault(target, {}).update(moved)
        _keep_optimizer(optimizer, log)
        optimizer.state.clear()
        optimizer.state.update(fresh)
        for group, options in zip(optimizer.param_groups, facts["groups"], strict=True):
            group["params"] = [parameters[name] for name in options["names"]]
            group.update(
                {
                    k: tuple(v) if isinstance(group.get(k), tuple) else v
                    for k, v in options["options"].items()
                }
            )
        if any(AGE in state for state in fresh.values()):
            watch(optimizer)


def load_tracker(tracker: ActivationTracker, content: Checkpoint) -> TrainingHistory | None:
    """Ids, statistics and history of the tracker's current model, which nobody else has seen yet.

    Raises:
        CheckpointError: They do not fit the model.
    """
    facts, entry = content.texts["engine"], tracker.current
    try:
        layers = tracker.registry.restore_from(facts["registry"], entry.name)
        widths = {name: len(ids.ids) for name, ids in entry.layers.items()}
        if widths and {n: len(layer.ids) for n, layer in layers.items() if n in widths} != widths:
            raise ValueError("layers have other widths")
        entry.layers = layers
        entry.neuron_map = {name: layer.ids for name, layer in layers.items()}
        entry.observer.samples = {bool(int(k)): int(n) for k, n in facts["samples"].items()}
        entry.correlated = entry.observer.correlate = bool(facts["correlated"])
        entry.mode = facts["mode"]
        _restore_seen(tracker, content.tensors["statistics"])
        history = facts["history"]
        return None if history is None else TrainingHistory.from_dict(history)
    except TrackerError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The engine's part of the checkpoint cannot be read: {error}"
        ) from error


def random_states(content: Checkpoint) -> Callable[[], None]:
    """Check the states of the random generators; what is returned sets them.

    Raises:
        CheckpointError: They are none.
    """
    facts = content.texts["engine"]["random"]
    try:
        noise = {k: v.clone() for k, v in content.tensors["random"].items()}
        version, words, gauss = facts["python"]
        python = (int(version), tuple(int(w) for w in words), gauss)
        random.Random().setstate(python)
        kind, position, has_gauss, cached = facts["numpy"]
        keys = noise["numpy"].numpy().astype(np.uint32)
        numpy = (kind, keys, int(position), int(has_gauss), float(cached))
        np.random.RandomState(0).set_state(numpy)
        torch.Generator().set_state(noise["torch"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"The random states cannot be read: {error}") from error

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(noise["torch"])

    return restore


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the other names of those that have several."""
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} of the state dict is no tensor: it cannot be saved.")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            weights[name] = tensor.detach().clone()
    return weights, aliases


def _optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for number, optimizer in enumerate(optimizers):
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                raise CheckpointError("The optimizer holds a parameter that is not the model's.")
            numbers[name] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}/{name}/{key}"] = value.detach().clone()
                elif value is None or isinstance(value, (int, float, str)):
                    numbers[name][key] = value
                else:
                    raise CheckpointError(
                        f"The state {key!r} of {type(optimizer).__name__} is a {type(value).__name__}: it cannot be "
                        "saved."
                    )
        groups = [
            {
                "names": [names[id(p)] for p in group["params"]],
                "options": {k: _plain(v) for k, v in group.items() if k != "params"},
            }
            for group in optimizer.param_groups
        ]
        facts.append({"class": type(optimizer).__name__, "groups": groups, "numbers": numbers})
    return tensors, facts


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _keep_optimizer(optimizer: Optimizer, log: UndoLog) -> None:
    state = dict(optimizer.state)
    groups = [dict(group) for group in optimizer.param_groups]

    def back() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)

    log.add(back)


def _swap(tensor: Tensor, value: Tensor, log: UndoLog) -> None:
    old, gradient = tensor.detach(), tensor.grad

    def back() -> None:
        tensor.grad = None
        tensor.set_(old)  # type: ignore[call-overload]
        tensor.grad = gradient

    log.add(back)
    tensor.grad = None
    form = (
        torch.channels_last
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    tensor.set_(value.to(tensor.device).clone(memory_format=form))  # type: ignore[call-overload]


def _table(content: Checkpoint, key: str) -> dict[str, Any]:
    table = content.texts["engine"].get(key) if isinstance(content.texts["engine"], dict) else None
    if not isinstance(table, dict):
        raise CheckpointError(f"The engine's part of the checkpoint has no {key!r}.")
    return table


def _seen(tracker: ActivationTracker) -> dict[str, Tensor]:
    """Statistics of the window, and what consumers were seen to read."""
    found: dict[str, Tensor] = {}
    for site in tracker.current.observer.sites:
        for mode, flag in MODES.items():
            window = None if site.leader is not None else site.windows.get(flag)
            if window is not None:
                found[f"activity/{mode}/{site.name}"] = window.activity.value().table
                if window.covariance is not None:
                    found.update(
                        _parts(f"covariance/{mode}/{site.name}", window.covariance.value())
                    )
    for name, read in tracker.current.reads.items():
        found.update(_parts(f"read/{read.dim}/{name}", read.covariance))
    return found


def _parts(key: str, value: Covariance) -> dict[str, Tensor]:
    return {
        f"{key}/count": value.count,
        f"{key}/mean": value.mean,
        f"{key}/comoment": value.comoment,
    }


def _restore_seen(tracker: ActivationTracker, tables: Mapping[str, Tensor]) -> None:
    entry = tracker.current
    sites = {site.name: site for site in entry.observer.sites}
    whole: dict[str, dict[str, Tensor]] = {}
    for key, value in tables.items():
        kind, mode, rest = key.split("/", 2)
        if kind == "activity":
            site = sites[rest]
            if value.ndim != 2 or value.shape[1] != site.neurons:
                raise ValueError(f"statistics of {rest} have the shape {tuple(value.shape)}")
            stream = ActivityStream.resumed(Activity(value.clone()), tracker.threshold)
            site.windows[MODES[mode]] = Window(stream, None)
        else:
            name, _, part = rest.rpartition("/")
            whole.setdefault(f"{kind}/{mode}/{name}", {})[part] = value.clone()
    for key, parts in whole.items():
        kind, mode, name = key.split("/", 2)
        covariance = Covariance(parts["count"], parts["mean"], parts["comoment"])
        if kind == "read":
            entry.reads[name] = Read(int(mode), covariance)
        else:
            sites[name].windows[MODES[mode]].covariance = CovarianceStream.resumed(covariance)


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state
    noise = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    facts = {
        "python": [version, list(words), gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
    }
    return noise, facts

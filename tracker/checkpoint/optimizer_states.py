"""What optimizers remember, by the names of their parameters; compared with the model before it is believed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.checkpoint.optimizer_checks import StateCheck
from tracker.errors import CheckpointError
from tracker.surgery.optimizer_state.slot_age import AGE, watch
from tracker.surgery.undo import UndoLog

PLAIN = (int, float, str, bool, type(None))
Facts = list[dict[str, Any]]


def gather_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Tensor], Facts]:
    """Tensors by "number/parameter/key", and the rest as plain data; of those that hold the model's parameters.

    Raises:
        CheckpointError: There is something that cannot be saved.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    facts: Facts = []
    ours = [
        o for o in optimizers if any(id(p) in names for g in o.param_groups for p in g["params"])
    ]
    for number, optimizer in enumerate(ours):
        kind, numbers = type(optimizer).__name__, dict[str, dict[str, Any]]()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(p) not in names for p in (*held, *optimizer.state)):
            raise CheckpointError(
                f"The {kind} holds parameters that are not the model's beside some that are."
            )
        for parameter, state in optimizer.state.items():
            name = names[id(parameter)]
            numbers[name] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{number}/{name}/{key}"] = value.detach().clone()
                elif isinstance(value, PLAIN):
                    numbers[name][key] = value
                else:
                    raise CheckpointError(
                        f"The state {key!r} of {kind} is a {type(value).__name__}: it cannot be saved."
                    )
        groups = [
            {
                "names": [names[id(p)] for p in group["params"]],
                "options": {k: _plain(kind, k, v) for k, v in group.items() if k != "params"},
            }
            for group in optimizer.param_groups
        ]
        facts.append({"class": kind, "groups": groups, "numbers": numbers})
    return tensors, facts


def check_ownership(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that were not built over the parameters of the fresh model.

    Raises:
        CheckpointError: One holds others.
    """
    own = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise CheckpointError(
                f"The {type(optimizer).__name__} holds parameters that are not the fresh model's: build it over "
                "fresh_model.parameters()."
            )


def load_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    tables: Mapping[str, Tensor],
    facts: Any,
    log: UndoLog,
) -> None:
    """Give optimizers back what they knew of the model's parameters; those of inserted layers join their groups.

    Raises:
        CheckpointError: There are others than were saved, or what was saved does not fit.
    """
    if not optimizers:
        return
    if not isinstance(facts, list) or len(facts) != len(optimizers):
        saved = len(facts) if isinstance(facts, list) else "no"
        raise CheckpointError(f"{saved} optimizers were saved, and {len(optimizers)} given.")
    parameters = dict(model.named_parameters())
    states: list[dict[str, dict[str, Any]]] = [{} for _ in optimizers]
    for number, saved in enumerate(facts):
        for name, numbers in saved["numbers"].items():
            _known(name, parameters)
            if not all(isinstance(v, PLAIN) for v in numbers.values()):
                raise CheckpointError(f"What the optimizer knew of {name} are no numbers.")
            states[number][name] = {str(key): value for key, value in numbers.items()}
    for path, value in tables.items():
        place, _, rest = path.partition("/")
        name, _, key = rest.rpartition("/")
        if not place.isdecimal() or int(place) >= len(optimizers):
            raise CheckpointError(f"{path!r} belongs to no optimizer.")
        parameter, optimizer = _known(name, parameters), optimizers[int(place)]
        stays = value.ndim == 0 and not (optimizer.defaults.get("fused") and parameter.is_cuda)
        device = value.device if stays else parameter.device
        states[int(place)].setdefault(name, {})[key] = _like(parameter, value.to(device))
    groups = [
        _groups(optimizer, saved, parameters)
        for optimizer, saved in zip(optimizers, facts, strict=True)
    ]
    for optimizer, state, group in zip(optimizers, states, groups, strict=True):
        _require_states(optimizer, state, group, parameters)
    for optimizer, state, group in zip(optimizers, states, groups, strict=True):
        _keep(optimizer, log)
        optimizer.state.clear()
        optimizer.state.update({parameters[name]: values for name, values in state.items()})
        for mine, new in zip(optimizer.param_groups, group, strict=True):
            mine.update(new)
        if any(AGE in values for values in state.values()):
            _keep_hooks(optimizer, log)
            watch(optimizer)


def _require_states(
    optimizer: Optimizer,
    states: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Each state is of a parameter in a group, and what a step with the group's options makes."""
    check = StateCheck(optimizer, type(optimizer).__name__)
    options = {id(p): group for group in groups for p in group["params"]}
    for mine, group in zip(optimizer.param_groups, groups, strict=True):
        for parameter in group["params"]:
            check.require_options(group, mine, parameter)
    for name, state in states.items():
        parameter = parameters[name]
        if id(parameter) not in options:
            raise CheckpointError(f"The optimizer knew {name}, which is in none of its groups.")
        check.require(options[id(parameter)], parameter, state, name)


def _groups(
    optimizer: Optimizer, saved: Any, parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"The optimizer was a {saved['class']} and is a {type(optimizer).__name__}."
        )
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError("The optimizer has another number of parameter groups.")
    named = [name for group in saved["groups"] for name in group["names"]]
    if len(set(named)) < len(named):
        raise CheckpointError("The optimizer is said to hold a parameter twice.")
    found = []
    for mine, group in zip(optimizer.param_groups, saved["groups"], strict=True):
        options = {k: _option(k, v, mine.get(k)) for k, v in group["options"].items()}
        options["params"] = [_known(name, parameters) for name in group["names"]]
        found.append(options)
    return found


def _option(key: str, value: Any, mine: Any) -> Any:
    """A saved option as the kind of thing that the optimizer has in its place."""
    if isinstance(mine, list | tuple):
        if not isinstance(value, list) or len(value) != len(mine):
            raise CheckpointError(
                f"The option {key!r} of the optimizer is {str(value)[:80]!r}, and not {len(mine)} numbers."
            )
        parts = [_option(key, part, own) for part, own in zip(value, mine, strict=True)]
        return tuple(parts) if isinstance(mine, tuple) else parts
    parts = value if isinstance(value, list) else [value]
    if key == "params" or not all(isinstance(part, PLAIN) for part in parts):
        raise CheckpointError(f"The option {key!r} of the optimizer is {str(value)[:80]!r}.")
    number = isinstance(mine, int | float | Tensor) and not isinstance(mine, bool)
    if number and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise CheckpointError(f"The option {key!r} of the optimizer is no number: {value!r}.")
    if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
        raise CheckpointError(f"The option {key!r} of the optimizer is {value!r}.")
    if isinstance(mine, bool) and not isinstance(value, bool | None):
        raise CheckpointError(f"The option {key!r} of the optimizer is neither true nor false.")
    if isinstance(mine, Tensor):
        return torch.full_like(mine, value)
    return value


def _known(name: Any, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
    if name not in parameters:
        raise CheckpointError(f"The optimizer knew {name!r}, which the model does not have.")
    return parameters[name]


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if value.shape == parameter.shape and not parameter.is_contiguous():
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
    return value.clone()


def _plain(kind: str, key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if not all(isinstance(part, PLAIN) for part in parts):
        raise CheckpointError(
            f"The option {key!r} of {kind} is a {type(value).__name__}: it cannot be saved."
        )
    return parts if isinstance(value, tuple | list) else value


def _keep(optimizer: Optimizer, log: UndoLog) -> None:
    state = dict(optimizer.state)
    groups = [dict(group) for group in optimizer.param_groups]

    def back() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)

    log.add(back)


def _keep_hooks(optimizer: Optimizer, log: UndoLog) -> None:
    tables: tuple[Any, ...] = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    )
    before = [list(table) for table in tables]

    def back() -> None:
        for table, keys in zip(tables, before, strict=True):
            for key in [key for key in table if key not in keys]:
                del table[key]

    log.add(back)

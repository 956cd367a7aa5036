"""Example inputs as plain data and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracker.inputs.calls import Call, calls_of

Inputs = tuple[tuple[object, ...], dict[str, object]]


def gather_inputs(inputs: Inputs | None) -> tuple[dict[str, Tensor], Any]:
    """Tensors, and where they stand; nothing if the model takes other objects than tensors and plain data."""
    tables: dict[str, Tensor] = {}
    if inputs is None:
        return tables, None
    try:
        return tables, _plain((tuple(inputs[0]), dict(inputs[1])), tables)
    except TypeError:
        return {}, None


def inputs_from(tables: Mapping[str, Tensor], data: Any) -> Inputs | None:
    """The inputs of plain data.

    Raises:
        ValueError: They are none.
    """
    if data is None:
        return None
    inputs: Any = _built(data, tables)
    if not isinstance(inputs, tuple) or len(inputs) != 2:
        raise ValueError("the example inputs are no arguments")
    args, kwargs = inputs
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise ValueError("the example inputs are no arguments")
    return args, kwargs


def gather_calls(
    calls: Sequence[Call], model: nn.Module, tables: dict[str, Tensor]
) -> dict[str, Any] | None:
    """How each call is made, and the arguments of those after the first; their tensors are added to `tables`."""
    more = [(call.args, dict(call.kwargs)) for call in calls[1:]]
    added = dict(tables)
    try:
        places = _plain(more, added)
    except TypeError:
        return None
    if not calls or not all(_is_method(model, call.method) for call in calls):
        return None
    tables.update(added)
    return {"how": [[call.method, call.training] for call in calls], "more": places}


def calls_from(
    tables: Mapping[str, Tensor], data: Any, first: Inputs | None, model: nn.Module
) -> tuple[Call, ...]:
    """The calls of plain data; none, if none were saved.

    Raises:
        ValueError: They are no calls of the model.
    """
    if data is None or first is None:
        return ()
    more: Any = _built(data["more"], tables)
    calls = []
    for given, (method, training) in zip([first, *more], data["how"], strict=True):
        args, kwargs = given
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("the example calls have no arguments")
        if not _is_method(model, method) or not (training is None or type(training) is bool):
            raise ValueError(f"{method!r} is no call of the model")
        calls.append(Call.of(args, kwargs, method, training))
    return calls_of(calls)


def _is_method(model: nn.Module, name: object) -> bool:
    """Whether it is a method of the model's own: those of every module change it, or move it."""
    if not isinstance(name, str) or (name != "forward" and hasattr(nn.Module, name)):
        return False
    return callable(getattr(type(model), name, None))


def _plain(value: object, tables: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_meta:
            raise TypeError
        name = f"input.{len(tables)}"
        tables[name] = value.detach().cpu().clone()
        return {"tensor": name, "device": str(value.device)}
    if type(value) is tuple or type(value) is list:
        return {type(value).__name__: [_plain(part, tables) for part in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(part, tables) for key, part in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError


def _built(data: Any, tables: Mapping[str, Tensor]) -> object:
    (kind, value) = next(iter(data.items()))
    if kind == "tensor":
        tensor = tables[value].clone()
        return tensor if data["device"] == "cpu" else tensor.to(data["device"])
    if kind == "dict":
        return {str(key): _built(part, tables) for key, part in value.items()}
    if kind in ("tuple", "list"):
        parts = [_built(part, tables) for part in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "value" and (value is None or type(value) in (bool, int, float, str)):
        return value
    raise ValueError(f"{kind!r} is nothing that a model takes")

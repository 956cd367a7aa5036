"""Example inputs as plain data and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

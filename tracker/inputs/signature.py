"""What a forward method takes, and kinds of values: what can be told without calling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracker.inputs.calls import Call, short


@dataclass(frozen=True, slots=True)
class Kind:
    """Of a value: a tensor's kind of numbers and its rank, or else its type."""

    type: Any
    ndim: int | None = None

    @classmethod
    def of(cls, value: Any) -> Kind:
        """The kind of a value."""
        if not isinstance(value, Tensor):
            return cls(Mapping if isinstance(value, Mapping) else type(value))
        numbers = "float" if value.is_floating_point() or value.is_complex() else "integer"
        return cls("bool" if value.dtype == torch.bool else numbers, value.ndim)

    @property
    def tensor(self) -> bool:
        """Whether it is that of a tensor."""
        return self.ndim is not None

    def may_be(self, other: Kind) -> bool:
        """Whether an argument that was of this kind may be of the other: another rank, or None, is no obstacle."""
        return self.type == other.type or type(None) in (self.type, other.type)

    def __str__(self) -> str:
        if self.tensor:
            return f"a {self.type} tensor of rank {self.ndim}"
        return str(getattr(self.type, "__name__", self.type))


class Signature:
    """What a forward method takes."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        try:
            signature = inspect.signature(forward)
            params = list(signature.parameters.values())
            self.text = "(" + ", ".join(_param(p) for p in params) + ")"
        except (TypeError, ValueError):  # not written in Python
            params, self.text = [], "arguments that it does not tell"
        kinds = inspect.Parameter
        several = not params and self.text != "()"
        self._places = [
            p.name for p in params if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self._more = several or any(p.kind is kinds.VAR_POSITIONAL for p in params)
        self._keys = {
            p.name for p in params if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        }
        self._any_key = several or any(p.kind is kinds.VAR_KEYWORD for p in params)
        variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        self.required = [
            p.name for p in params if p.default is kinds.empty and p.kind not in variadic
        ]
        self._settings = {p.name for p in params if isinstance(p.default, bool | int | float | str)}

    def names(self, count: int) -> list[str] | None:
        """Names of the first so many positional arguments; None if it does not take so many."""
        if count > len(self._places) and not self._more:
            return None
        return [*self._places, *(f"*{i}" for i in range(count))][:count]

    def has(self, key: object) -> bool:
        """Whether it can be passed by this name."""
        return isinstance(key, str) and (self._any_key or key in self._keys)

    def is_setting(self, name: str) -> bool:
        """Whether an argument is a number, a flag or a word by default: no place for data."""
        return name in self._settings

    def kinds(self, call: Call) -> dict[str, Kind]:
        """Kinds of what a call passes, by name; what is no data is left out."""
        names = self.names(len(call.args)) or []
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        plain = (bool, int, float, str, type(None))
        return {n: Kind.of(v) for n, v in given.items() if type(v) not in plain}


def _param(p: inspect.Parameter) -> str:
    stars: dict[Any, str] = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}
    default = "" if p.default is inspect.Parameter.empty else f"={short(p.default)}"
    return f"{stars.get(p.kind, '')}{p.name}{default}"

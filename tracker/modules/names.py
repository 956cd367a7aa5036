"""Layers are named by their paths in the model, or are the modules themselves."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from tracker.errors import NotTrackedError

T = TypeVar("T")
LayerOrName: TypeAlias = str | nn.Module
ByLayer: TypeAlias = Mapping[str, T] | Mapping[nn.Module, T] | Mapping[LayerOrName, T]


def name_of(model: Callable[[], nn.Module], layer: Any) -> Any:
    """The name that a module has in the model; what is no module as it is.

    Args:
        model: Gives the model; it is asked only where there is a module.
        layer: A module of the model, or its name.

    Raises:
        NotTrackedError: The model has no such module.
    """
    if not isinstance(layer, nn.Module):
        return layer
    whole = model()
    found = next((name for name, module in whole.named_modules() if module is layer), None)
    if found is None:
        same = [n for n, m in whole.named_modules() if n and type(m) is type(layer)]
        there = f", which has {', '.join(map(repr, same[:4]))} of this kind" if same else ""
        raise NotTrackedError(
            f"This {type(layer).__name__} is no module of the tracked {type(whole).__name__}{there}. Take it from the "
            "model as it is now, or give its name."
        )
    return found


def names_in(model: Callable[[], nn.Module], given: Any, *, pattern: bool = False) -> Any:
    """The same with names in the place of modules: of one, of several, and of the keys of a mapping.

    Args:
        model: As for `name_of`.
        given: Names, modules, ids or numbers, as a call takes them.
        pattern: Names are patterns as of a shell: those of modules stand for themselves.

    Raises:
        NotTrackedError: The model has no such module, or one is there twice.
    """

    def named(one: Any) -> Any:
        name = name_of(model, one)
        return glob.escape(name) if pattern and isinstance(one, nn.Module) else name

    # A container of torch is iterable, and one module.
    if isinstance(given, str | bytes | nn.Module | Tensor):
        return named(given)
    if isinstance(given, Mapping):
        if not any(isinstance(one, nn.Module) for one in given):
            return given
        found = {named(one): value for one, value in given.items()}
        if len(found) < len(given):
            names = [named(one) for one in given]
            twice = next(name for name in found if names.count(name) > 1)
            raise NotTrackedError(f"{twice!r} is there twice: by its name and as a module.")
        return found
    return [named(one) for one in given] if isinstance(given, Iterable) else given

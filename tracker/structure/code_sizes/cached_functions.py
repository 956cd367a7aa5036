"""Functions that Python caches: of integers of the model they are computed, and not looked up.

A cache finds what was computed for an equal number before, and the expression of this one is lost: which axis a shape
speaks of would hang on what ran first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from tracker.structure.code_sizes.traced_int import TracedInt

_Cached = functools._lru_cache_wrapper
# Nothing in these is called with a model's integers but by way of torch's functions, which are heard.
_OTHERS = {*sys.stdlib_module_names, "torch", "numpy", "tracker", "sympy", "matplotlib"} - {
    "__main__"
}
DEEPEST = 4  # tuple in a tuple, that is looked into


class _Place(NamedTuple):
    """Where a cached function stands, and what stands there while sizes are traced."""

    holder: Any  # a module or a class
    name: str
    cached: _Cached[Any]
    computed: Callable[..., Any]


class _Module(NamedTuple):
    """What was found in a module, and of how many names in it."""

    module: ModuleType
    table: dict[str, Any]
    names: int
    places: list[_Place]


@contextmanager
def sizes_not_cached() -> Iterator[None]:
    """Inside, functions under `functools.lru_cache` (or `cache`) are called past it with integers that are traced.

    With anything else they are looked up as ever: what is made once stays one. Those are found that stand in a module
    or a class of one.
    """
    replaced: list[_Place] = []
    try:
        for place in _places():
            if vars(place.holder).get(place.name) is place.cached:
                replaced.append(place)
                setattr(place.holder, place.name, place.computed)
        yield
    finally:
        for place in reversed(replaced):
            setattr(place.holder, place.name, place.cached)


def _computed(cached: _Cached[Any]) -> Callable[..., Any]:
    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_traced(args, DEEPEST) or _is_traced(kwargs, DEEPEST):
            return cached.__wrapped__(*args, **kwargs)
        return cached(*args, **kwargs)

    for name in ("__wrapped__", "cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _is_traced(value: object, depth: int) -> bool:
    if isinstance(value, TracedInt):
        return True
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(_is_traced(v, depth - 1) for v in value.values())
    return isinstance(value, (tuple, frozenset)) and any(_is_traced(v, depth - 1) for v in value)


def _places() -> list[_Place]:
    """Of all modules. A module is read anew once names came to it or left it: there are thousands of them."""
    modules: dict[str, Any] = dict(sys.modules)  # anything may stand in it
    changed = [
        name
        for name, known in _read.items()
        if modules.get(name) is not known.module or len(known.table) != known.names
    ]
    for name in changed:
        del _read[name]
    for name in modules.keys() - _read.keys() - _ignored:
        module = modules[name]
        if name.partition(".")[0] in _OTHERS:
            _ignored.add(name)
        elif isinstance(module, ModuleType):
            table = vars(module)
            _read[name] = _Module(module, table, len(table), _places_in(module))
    return [place for known in _read.values() for place in known.places]


def _places_in(module: ModuleType) -> list[_Place]:
    found = []
    for name, value in list(vars(module).items()):
        if isinstance(value, _Cached):
            found.append(_Place(module, name, value, _computed(value)))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for key, part in list(vars(value).items()):
                if isinstance(part, _Cached):
                    found.append(_Place(value, key, part, _computed(part)))
    return found


_read: dict[str, _Module] = {}
_ignored: set[str] = set()  # names of modules

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
from typing import Any

from tracker.structure.code_sizes.traced_int import TInt

_Cached = functools._lru_cache_wrapper
# Nothing in these is called with a model's integers but by way of torch's functions, which are heard.
_OTHERS = {*sys.stdlib_module_names, "torch", "numpy", "tracker", "sympy", "matplotlib"} - {
    "__main__"
}
DEEPEST = 4  # tuple in a tuple, that is looked into


@contextmanager
def sizes_not_cached() -> Iterator[None]:
    """Inside, functions under `functools.lru_cache` (or `cache`) are called past it with integers that are traced.

    With anything else they are looked up as ever: what is made once stays one. Those are found that stand in a module
    or a class of one.
    """
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for holder, name, cached in list(_cached_functions()):
            replaced.append((holder, name, cached))
            setattr(holder, name, _computed(cached))
        yield
    finally:
        for holder, name, cached in reversed(replaced):
            setattr(holder, name, cached)


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
    if isinstance(value, TInt):
        return True
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(_is_traced(v, depth - 1) for v in value.values())
    return isinstance(value, (tuple, frozenset)) and any(_is_traced(v, depth - 1) for v in value)


def _cached_functions() -> Iterator[tuple[Any, str, _Cached[Any]]]:
    """Holder, name, and cached function."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] in _OTHERS:
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, _Cached):
                yield module, name, value
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for key, part in list(vars(value).items()):
                    if isinstance(part, _Cached):
                        yield value, key, part

"""Hooks that a pass registers, or takes away, where nothing is to be left of the pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from tracker.inputs.repeatable import open_modules

# Each table of hooks, with those that say how its hooks are called.
_TABLES = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}


class _Saved(NamedTuple):
    """A table as it was: hooks by their keys, and of each that says how, the keys."""

    module: nn.Module
    name: str
    hooks: Mapping[int, Any]
    options: Mapping[str, Mapping[int, Any]]


_NONE: Mapping[Any, Any] = {}


@contextmanager
def hooks_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hooks of others that are registered inside are gone afterwards, and those that were taken away are back.

    Code that prepares itself in its first pass notes that it did, in an attribute; this is put back, so that it would
    register its hooks once more. Hooks of this library come and go as they do.
    """
    saved = [
        _saved(m, own, name, options)
        for m in open_modules(modules)
        for own in (vars(m),)
        for name, options in _TABLES.items()
    ]
    try:
        yield
    finally:
        for one in saved:
            if one.hooks.keys() != vars(one.module)[one.name].keys():
                _put_back(one)


def _saved(module: nn.Module, own: Mapping[str, Any], name: str, options: Sequence[str]) -> _Saved:
    if not own[name]:  # most of them
        return _Saved(module, name, _NONE, _NONE)
    return _Saved(module, name, dict(own[name]), {o: dict(own[o]) for o in options})


def _put_back(saved: _Saved) -> None:
    table = vars(saved.module)[saved.name]
    now = dict(table)
    kept = {k: hook for k, hook in saved.hooks.items() if k in now or not _is_ours(hook)}
    kept |= {k: hook for k, hook in now.items() if k in kept or _is_ours(hook)}
    table.clear()
    table.update(kept)
    for name in _TABLES[saved.name]:
        option = vars(saved.module)[name]
        before = saved.options.get(name, _NONE)
        wanted = {k: v for k, v in {**before, **option}.items() if k in kept}
        option.clear()
        option.update(wanted)


def _is_ours(hook: object) -> bool:
    owner = hook if hasattr(hook, "__qualname__") else type(hook)
    return (getattr(owner, "__module__", None) or "").startswith("tracker.")

"""Hooks that live inside compiled graphs too, and that know whether a pass is new data."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tracker.inputs.forward_pass import is_probing

# Private in torch, so looked up with care: -1 outside of a backward pass.
_graph_task_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_functorch = getattr(torch._C, "_functorch", None)
_functorch_level: Callable[[], Any] = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state


class InertHook:
    """What a hook becomes when its module is copied or unpickled: nothing."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""


class GraphHook:
    """A hook that does not follow its module into a copy or a file.

    Inside a compiled graph it calls the operator `tracker::observe`, which comes back to `seen` at run time: so
    tracking neither breaks the graph nor silently vanishes from it. Always returns None: the output stays as it is.
    """

    def __init__(self) -> None:
        self._key = next(_keys)
        with torch.inference_mode(False):
            self._ticket = torch.zeros(())
        _hooks_in_graphs[self._key] = self

    def __deepcopy__(self, memo: object) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()

    def in_graph(self, tensor: Tensor | None) -> None:
        """Leave a call of the operator in the graph that is being compiled."""
        if tensor is not None and not _exporting():
            torch.ops.tracker.observe(tensor, self._ticket, self._key)

    def seen(self, tensor: Tensor) -> None:
        """Called by the operator, each time that the compiled graph runs."""
        raise NotImplementedError


def is_new_data() -> bool:
    """False for recomputation under checkpointing, function transforms, tracing, and passes of our own."""
    return (
        _graph_task_id() == -1
        and not is_probing()
        and _functorch_level() is None
        and _tracing_state() is None
    )


def forget_compiled_graphs() -> None:
    """Graphs compiled before the hooks were there would never call them, in silence (pytorch #117758)."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()


def _exporting() -> bool:
    # Not torch.compiler.is_exporting(): torch 2.9 answers True inside torch.compile, and nothing would be observed.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


# A compiled graph can name a hook by a number only.
_keys = itertools.count()
_hooks_in_graphs: weakref.WeakValueDictionary[int, GraphHook] = weakref.WeakValueDictionary()


# The ticket is declared as written to, so that no compiler drops the call as useless.
@torch.library.custom_op("tracker::observe", mutates_args=("ticket",))
def _observe_op(tensor: Tensor, ticket: Tensor, key: int) -> None:
    hook = _hooks_in_graphs.get(key)
    if hook is not None:
        hook.seen(tensor)


@_observe_op.register_fake
def _nothing_to_shape(tensor: Tensor, ticket: Tensor, key: int) -> None:
    return None

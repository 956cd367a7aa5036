"""Sizes that modules keep beside their parameters, brought in line with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tracker.modules.kinds import kind_of
from tracker.structure.adapters.attention import DecoupledMultiheadAttention
from tracker.structure.adapters.registry import adapt as adapt_module
from tracker.structure.adapters.registry import needs_adapter
from tracker.structure.adapters.transformers_stacks import list_kinds
from tracker.structure.code_sizes.traced_int import Attribute, set_attributes

_MISSING = object()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are in no state dict."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def sync_attributes(
    model: nn.Module,
    attributes: Mapping[Attribute, int],
    undo: Callable[[Callable[[], None]], None],
) -> None:
    """After a change of its tensors: set the attributes, and what modules of torch keep of their sizes.

    `undo` is told how to take it back, before anything is written.
    """
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    made: list[tuple[nn.Module, type, dict[str, Any]]] = []

    def changes() -> list[tuple[nn.Module, type, dict[str, Any]]]:
        return [(module, kind, _changed(module, values)) for module, kind, values in before]

    undo(lambda: _put_back(made or changes()))
    for module, *_ in before:
        if needs_adapter(module):
            adapt_module(module)
    set_attributes(model, attributes)
    if any(a.owner for a in attributes):  # the configurations are this model's own now
        list_kinds(model)
    for module, *_ in before:
        refit(module)
    # Only what was changed here goes back: flags and hooks may change in the meantime.
    made += changes()


def _changed(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    now = vars(module)
    keys = dict.fromkeys((*values, *now))
    return {
        k: values.get(k, _MISSING)
        for k in keys
        if now.get(k, _MISSING) is not values.get(k, _MISSING)
    }


def _put_back(changes: list[tuple[nn.Module, type, dict[str, Any]]]) -> None:
    for module, kind, values in changes:
        if type(module) is not kind:
            module.__class__ = kind
        for key, value in values.items():
            if value is _MISSING:
                vars(module).pop(key, None)
            else:
                vars(module)[key] = value


def refit(module: nn.Module) -> None:
    """Set the sizes that a module of a known kind keeps beside its parameters to what these are now."""
    m: Any = module  # mypy takes every attribute of a module for a tensor or a module
    if isinstance(m, nn.TransformerEncoder):
        if any(isinstance(part, DecoupledMultiheadAttention) for part in m.modules()):
            m.use_nested_tensor = False  # it is made for torch's own attention
    elif isinstance(m, DecoupledMultiheadAttention):
        q, k, v = (w for w, _ in m.projections())
        m.embed_dim, m.kdim, m.vdim = (w.shape[1] for w in (q, k, v))
    elif (kind := kind_of(module)) is not None:
        kind.refit(module)

"""An open registry of modules whose own forward ties sizes that pruning must part, and of what takes its place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracker.errors import StructureError


@dataclass(frozen=True, slots=True)
class ModuleAdapter:
    """How a kind of module is made to run with sizes that its own forward does not allow.

    Attributes:
        kind: The class, as its library has it. Subclasses are left alone: their forward may be another.
        adapted: A subclass with the same parameters, whose forward gives the same, and takes its sizes from them.
        fits: `fits(module)` → whether the forward of `kind` can run with the parameters as they are.
        adapt: `adapt(module)` sets the attributes that the forward of `adapted` needs, on a module whose forward still
            fits, or did before its parameters changed; False where there is no way for this module. Its class is set
            afterwards.

    Examples:
        >>> from tracker import ModuleAdapter
        >>> class Fixed(nn.Module):  # its code ties a size
        ...     def forward(self, x):
        ...         return self.down(self.up(x).view(-1, 8))
        >>> class Free(Fixed):  # the same for any size
        ...     def forward(self, x):
        ...         return self.down(self.up(x))
        >>> adapter = ModuleAdapter(Fixed, Free, fits=lambda module: len(module.up.weight) == 8)
    """

    kind: type[nn.Module]
    adapted: type[nn.Module]
    fits: Callable[[Any], bool]
    adapt: Callable[[Any], bool | None] = lambda module: None


_ADAPTERS: dict[type[nn.Module], ModuleAdapter] = {}
# Of other libraries, looked for where a class of theirs is met: beginnings of module and class, what registers.
_LATER = {("torchvision.", "ShiftedWindow"): "tracker.structure.adapters.torchvision_swin"}


def register_adapter(adapter: ModuleAdapter) -> ModuleAdapter:
    """Have modules of a kind run by another forward once a change parts sizes that their own ties.

    Args:
        adapter: Of one class; the last one that was registered for it holds.

    Returns:
        The same.

    Raises:
        StructureError: The class that takes the place is no subclass of the kind.

    Examples:
        >>> from tracker import ModuleAdapter, register_adapter
        >>> class Fixed(nn.Module): ...
        >>> class Free(Fixed): ...
        >>> register_adapter(ModuleAdapter(Fixed, Free, fits=lambda module: True))  # doctest: +ELLIPSIS
        ModuleAdapter(...)
    """
    kind, adapted = adapter.kind, adapter.adapted
    if not (isinstance(adapted, type) and isinstance(kind, type) and issubclass(adapted, kind)):
        raise StructureError(
            f"{adapted!r} is no subclass of {kind!r}: a module keeps its attributes and stays an instance of its kind."
        )
    _ADAPTERS[kind] = adapter
    return adapter


def can_be_adapted(module: nn.Module) -> bool:
    """Whether there is another forward for this module, or it runs it already."""
    _look_for(module)
    return isinstance(module, tuple(_ADAPTERS))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module runs by another forward than that of its kind."""
    return kind_of(module) is not type(module)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that of which it was before it ran by another forward."""
    kinds = (a.kind for a in _ADAPTERS.values() if a.adapted is type(module))
    return next(kinds, type(module))


def needs_adapter(module: nn.Module) -> bool:
    """Whether the sizes of a module's parameters have become such that its own forward cannot run."""
    adapter = _of(module)
    return adapter is not None and not adapter.fits(module)


def adapt(module: nn.Module) -> None:
    """Put the other forward in place of the module's own, where there is one; it gives the same."""
    adapter = _of(module)
    if adapter is not None and adapter.adapt(module) is not False:
        module.__class__ = adapter.adapted


def _of(module: nn.Module) -> ModuleAdapter | None:
    _look_for(module)
    return _ADAPTERS.get(type(module))


def _look_for(module: nn.Module) -> None:
    """Import what registers adapters of another library's classes; of all other modules nothing is imported."""
    for (library, name), place in _LATER.items():
        for kind in type(module).__mro__:
            if kind.__module__.startswith(library) and kind.__name__.startswith(name):
                importlib.import_module(place)

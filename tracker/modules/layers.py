"""Which modules have neurons, how many, and along which axis of the output they lie."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracker.errors import NotTrackedError
from tracker.modules.kinds import Width, kind_of

MOST_DIMENSIONS = 64  # of a tensor
# Attributes by which modules of other libraries name their width, the last axis of their output.
_WIDTH_ATTRIBUTES = ("out_features", "embedding_dim")


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with neurons. `neurons` and `axis` are None until the first forward pass shows them."""

    name: str
    module: nn.Module
    kind: str
    neurons: int | None
    axis: int | None
    flattened: int = 1  # trailing dimensions that together are the neurons' axis (LayerNorm)


def find_layers(model: nn.Module, axes: Mapping[str, int] | None = None) -> Iterator[Layer]:
    """Layers of `model` in module order. `axes` names the neurons' axis of layers by hand."""
    axes = axes or {}
    hidden: set[nn.Module] = set()  # inner modules of opaque ones
    for name, module in model.named_modules():
        kind = kind_of(module)
        if (kind is not None and kind.opaque) or name.endswith("parametrizations"):
            hidden.update(m for m in module.modules() if m is not module)
        # What a kind without a width learns makes no features.
        if module in hidden or (kind is not None and kind.width is None):
            continue
        if isinstance(module, torch.jit.ScriptModule):  # runs no Python hooks
            continue
        width = known_width(module)
        if width is None and not (name in axes or _is_custom_layer(module)):
            continue
        yield Layer(
            name,
            module,
            type(module).__name__,
            width[0] if width else None,
            axes.get(name, width[1] if width else None),
            flattened=1 if kind is None else kind.flattened(module),
        )


def require_axes(model: nn.Module, axes: Mapping[str, int], batch_dim: int) -> None:
    """See that axes are named of modules that there are, and can be dimensions of a tensor.

    Raises:
        NotTrackedError: The model has no such module, or no tensor such a dimension.
    """
    names = {name for name, _ in model.named_modules()}
    for name, axis in axes.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 3, 0.0)
            raise NotTrackedError(
                f"axes names {name!r}, and the model has no such module. Near: {', '.join(near)}."
            )
        if not -MOST_DIMENSIONS <= axis < MOST_DIMENSIONS:
            raise NotTrackedError(f"axes of {name!r} is a dimension of its output, not {axis!r}.")
    if not -MOST_DIMENSIONS <= batch_dim < MOST_DIMENSIONS:
        raise NotTrackedError(f"batch_dim is a dimension of the first input, not {batch_dim!r}.")


def known_width(module: nn.Module) -> Width | None:
    """Neurons and axis of a module whose class tells them; None for any other."""
    kind = kind_of(module)
    if kind is not None:
        width = None if kind.width is None else kind.width(module)
        # Lazy modules say 0 until they have seen data.
        return width if width and width[0] else None
    if next(module.children(), None) is None:
        for attribute in _WIDTH_ATTRIBUTES:
            size = getattr(module, attribute, None)
            if isinstance(size, int) and size > 0:
                return size, -1
    return None


def width_of(module: nn.Module, output: Tensor, axis: int | None) -> Width | None:
    """Neurons and axis of a module whose class did not tell them, from its first output.

    A lazy module tells them now. A custom one shows them by the sizes of its own parameters: the last axis if a
    parameter has its size, else axis 1 if one has (channels first). An output whose axes match no parameter has no
    neurons that we could name.
    """
    if (known := known_width(module)) is not None:
        return known
    if axis is not None:  # named by hand
        return (output.shape[axis], axis) if -output.ndim <= axis < output.ndim else None
    sizes = {n for p in module.parameters(recurse=False) for n in p.shape if n > 1}
    for candidate in (-1, 1):
        if output.ndim > max(candidate, 0) and output.shape[candidate] in sizes:
            return output.shape[candidate], candidate
    return None


def _is_custom_layer(module: nn.Module) -> bool:
    """A leaf with parameters of its own, of a class that is not listed: its first output shows its width."""
    has_parameters = any(True for _ in module.parameters(recurse=False))
    return has_parameters and next(module.children(), None) is None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module behind `torch.compile`, DataParallel and DistributedDataParallel.

    Raises:
        NotTrackedError: Not a module, or one that runs no Python hooks.
    """
    inner: object = model
    while isinstance(inner, nn.Module):  # wrappers may wrap wrappers
        model = inner
        is_parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module" if is_parallel else "_orig_mod", None)
    if not isinstance(model, nn.Module):
        raise NotTrackedError(f"A torch.nn.Module can be tracked, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise NotTrackedError(
            "A scripted or traced module runs no Python hooks and cannot be tracked. Track the module it was made from."
        )
    return model

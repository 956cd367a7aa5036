"""Kinds of layers: what is known of a class of modules, in one table, which users extend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from tracker.errors import StructureError
from tracker.utils.empty_tables import empty_tables

# A layer's neurons and their axis in its output; negative where that holds with and without a batch.
Width = tuple[int, int]
# Under which names modules keep what their weight is computed from, before torch had parametrizations.
_STORED = ("", "_orig", "_v", "_g")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What is known of a class of modules.

    Attributes:
        width: Its neurons, and their axis in its output; None of a kind that has none (PReLU, say).
        weight: Key of the parameter that makes the neurons; None where no single one does.
        makes: Dimension of the weight along the outputs.
        reads: Dimension of the weight along the inputs, which it multiplies and adds up over; None where it does not.
        bias: Key of the parameter that is added to the output.
        axis: Of the input, along which it reads; by the module.
        why_not: Why a module of this kind cannot take over what others did, or "".
        refit: Sets the sizes that a module keeps beside its parameters to what these are now.
        unit: What one neuron is called: "neuron", "channel", "embedding", "hidden".
        follower: Makes a layer from the module's outputs to as many; None where none can stand behind it.
        grows: Whether neurons can be added.
        opaque: Its inner modules are never called: functional code reads their parameters.
        flattened: Trailing dimensions that together are the neurons' axis.

    Examples:
        >>> from tracker import LayerKind
        >>> kind = LayerKind(width=lambda module: (module.features, -1))  # neurons, and their axis in the output
    """

    width: Callable[[Any], Width] | None = None
    weight: str | None = None
    makes: Callable[[Any], int] = lambda module: 0
    reads: Callable[[Any], int] | None = None
    bias: str | None = "bias"
    axis: Callable[[Any], int] = lambda module: -1
    why_not: Callable[[Any], str] = lambda module: ""
    refit: Callable[[Any], None] = lambda module: None
    unit: str = "neuron"
    follower: Callable[[Any, int, Mapping[str, Any]], nn.Module] | None = None
    grows: bool = True
    opaque: bool = False
    flattened: Callable[[Any], int] = lambda module: 1


# By class, or by its full name where the library that it is of need not be there.
_KINDS: dict[type | str, LayerKind] = {}


def register_layer_kind(
    module_class: type[nn.Module],
    *,
    weight: str,
    makes: int,
    reads: int,
    bias: str | None = None,
    sizes: Mapping[str, tuple[str, int]] | None = None,
    grows: bool = True,
) -> None:
    """Say that modules of a class of yours are linear layers: x, times a matrix along its last axis, plus a bias.

    From then on they are observed, pruned, compensated, merged, grown and inserted after as `nn.Linear` is. Call it
    once, before the model is tracked.

    Args:
        module_class: The class; its subclasses are of this kind too.
        weight: Name of its parameter of two dimensions that is multiplied with the input.
        makes: The weight's dimension along the outputs: its neurons.
        reads: The weight's dimension along the inputs.
        bias: Name of its parameter that is added to the outputs, if there is one.
        sizes: Attribute of the module -> (parameter, dimension) whose size it holds: set anew after each change.
        grows: Whether neurons may be added.

    Raises:
        StructureError: This is no class of modules, or the dimensions are not 0 and 1.

    Examples:
        >>> class Dense(torch.nn.Module):
        ...     def __init__(self, inputs, features):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.randn(inputs, features))
        ...         self.bias, self.features = torch.nn.Parameter(torch.zeros(features)), features
        ...     def forward(self, x):
        ...         return x @ self.kernel + self.bias
        >>> register_layer_kind(
        ...     Dense, weight="kernel", makes=1, reads=0, bias="bias", sizes={"features": ("kernel", 1)}
        ... )
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise StructureError(f"A class of modules has a layer kind, not {module_class!r}.")
    if sorted((makes, reads)) != [0, 1]:
        raise StructureError(
            f"makes and reads of {module_class.__name__} are the dimensions 0 and 1 of its weight, not {makes} and "
            f"{reads}."
        )
    refit = _set(*((attribute, *place) for attribute, place in (sizes or {}).items()))

    def width(module: Any) -> Width:
        shape = shape_of(module, weight)
        return (0 if shape is None else shape[makes]), -1

    _KINDS[module_class] = LayerKind(
        width,
        weight,
        lambda m: makes,
        lambda m: reads,
        bias,
        refit=refit,
        follower=_linear,
        grows=grows,
    )


def kind_of(module: nn.Module) -> LayerKind | None:
    """What is known of a module's class, or of the nearest class that it is made of."""
    for cls in type(module).__mro__:
        kind = _KINDS.get(cls) or _KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            return kind
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module's output is known to be its input's last axis times a matrix, and a bias."""
    kind = kind_of(module)
    return kind is not None and kind.reads is not None and kind.unit == "neuron"


def made_along(module: nn.Module) -> int:
    """The dimension of a layer's weight along its outputs."""
    kind = kind_of(module)
    return 0 if kind is None else kind.makes(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight that makes a layer's neurons, as it is stored.

    Raises:
        AttributeError: No single tensor does.
    """
    kind = kind_of(module)
    weight: Tensor = stored(module, (kind.weight if kind is not None else None) or "weight")
    return weight


def stored(module: nn.Module, name: str) -> Any:
    """A parameter (or buffer, or None), or what is kept of it where it is computed.

    By a parametrization it is computed as in eval mode: in train mode some move what they keep.
    """
    for suffix in _STORED:
        if (kept := module._parameters.get(name + suffix)) is not None:
            return kept
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name, None)
    parts: Any = module.parametrizations[name]  # type: ignore[index]
    flags = [(part, part.training) for part in parts.modules()]
    try:
        for part, _ in flags:
            part.training = False
        with torch.no_grad():
            return getattr(module, name)
    finally:
        for part, flag in flags:
            part.training = flag


def shape_of(module: nn.Module, name: str) -> torch.Size | None:
    """The shape of a parameter or buffer as it is now; None if there is none. Computed ones are not computed."""
    if not parametrize.is_parametrized(module, name):
        tensor = stored(module, name)
        return None if tensor is None else tensor.shape
    parts: Any = module.parametrizations[name]  # type: ignore[index]
    empty = empty_tables(parts.modules())
    for t in (*parts.parameters(), *parts.buffers()):
        blank = torch.empty(
            t.shape, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype
        )
        empty[id(t)] = nn.Parameter(blank, False) if isinstance(t, nn.Parameter) else blank
    try:
        with torch.no_grad():
            value: Tensor = copy.deepcopy(parts, empty).eval()()
    except Exception:  # it wants values
        value = stored(module, name)
    return value.shape


def stored_names(module: nn.Module, name: str) -> list[str]:
    """Keys, in the module, of the tensors that are as long as this parameter along its outputs."""
    found = [name + suffix for suffix in _STORED if name + suffix in module._parameters]
    if parametrize.is_parametrized(module, name):
        parts: Any = module.parametrizations[name]  # type: ignore[index]
        found += [f"parametrizations.{name}.{key}" for key in parts._parameters]
    return found


def layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to, under a parametrization or not."""
    return f".{tensor}".rpartition(".")[0].partition(".parametrizations.")[0][1:]


def _linear(module: Any, width: int, options: Mapping[str, Any]) -> nn.Module:
    return nn.Linear(width, width, **options)


def _pointwise(module: Any, width: int, options: Mapping[str, Any]) -> nn.Module:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return kinds[len(module.kernel_size)](width, width, 1, **options)


def _set(*attributes: tuple[str, str, int]) -> Callable[[Any], None]:
    """Sets attributes to sizes: (attribute, parameter, dimension)."""

    def refit(module: Any) -> None:
        names = dict.fromkeys(parameter for _, parameter, _ in attributes)
        shapes = {name: shape_of(module, name) for name in names}
        for attribute, parameter, dim in attributes:
            if (shape := shapes[parameter]) is not None:
                setattr(module, attribute, shape[dim])

    return refit


def _convolution(transposed: bool) -> LayerKind:
    def refit(m: Any) -> None:
        shape = shape_of(m, "weight")
        assert shape is not None
        first, second = shape[:2]
        sizes = (first, second * m.groups) if transposed else (second * m.groups, first)
        m.in_channels, m.out_channels = sizes

    return LayerKind(
        lambda m: (m.out_channels, -1 - len(m.kernel_size)),
        "weight",
        lambda m: 1 if transposed else 0,
        lambda m: 0 if transposed else 1,
        # Where outputs overlap unevenly, a constant is no bias.
        None if transposed else "bias",
        axis=lambda m: -1 - len(m.kernel_size),
        why_not=lambda m: "is a grouped convolution" if m.groups > 1 else "",
        refit=refit,
        unit="channel",
        follower=_pointwise,
    )


def _normed(module: Any) -> None:
    if (shape := shape_of(module, "weight")) is not None:
        module.normalized_shape = tuple(shape)


def _instance_axis(module: nn.Module) -> int:
    dims = {"1": 1, "2": 2, "3": 3}
    return -1 - next(dims[c] for c in type(module).__name__ if c in dims)


def _recurrent(module: Any) -> Width:
    width = module.proj_size or module.hidden_size
    return width * (2 if module.bidirectional else 1), -1


def _refit_recurrent(module: Any) -> None:
    weights = dict(module.named_parameters())
    module.input_size, module.hidden_size = (
        weights[f"weight_{which}_l0"].shape[1] for which in ("ih", "hh")
    )
    module._init_flat_weights()


_BATCH_SIZE = _set(("num_features", "running_mean", 0))
_EMBEDDING = LayerKind(
    lambda m: (m.embedding_dim, -1),
    "weight",
    lambda m: 1,
    refit=_set(("embedding_dim", "weight", 1)),
    unit="embedding",
)
_LAYER_NORM = LayerKind(
    lambda m: (math.prod(m.normalized_shape), -1),
    "weight",
    refit=_normed,
    flattened=lambda m: max(1, len(m.normalized_shape)),
)
_KINDS |= {
    nn.Linear: LayerKind(
        lambda m: (m.out_features, -1),
        "weight",
        reads=lambda m: 1,
        refit=_set(("out_features", "weight", 0), ("in_features", "weight", 1)),
        follower=_linear,
    ),
    nn.Bilinear: LayerKind(lambda m: (m.out_features, -1)),
    _ConvNd: _convolution(transposed=False),
    _ConvTransposeNd: _convolution(transposed=True),
    _InstanceNorm: LayerKind(
        lambda m: (m.num_features, _instance_axis(m)), "weight", refit=_BATCH_SIZE
    ),
    _NormBase: LayerKind(lambda m: (m.num_features, 1), "weight", refit=_BATCH_SIZE),
    nn.GroupNorm: LayerKind(
        lambda m: (m.num_channels, 1), "weight", refit=_set(("num_channels", "weight", 0))
    ),
    nn.LayerNorm: _LAYER_NORM,
    nn.RMSNorm: _LAYER_NORM,
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.RNNBase: LayerKind(_recurrent, refit=_refit_recurrent, unit="hidden", opaque=True),
    nn.RNNCellBase: LayerKind(lambda m: (m.hidden_size, -1)),
    nn.MultiheadAttention: LayerKind(lambda m: (m.embed_dim, -1), opaque=True),
    nn.PReLU: LayerKind(refit=_set(("num_parameters", "weight", 0))),
    "torchvision.ops.deform_conv.DeformConv2d": LayerKind(
        lambda m: (m.out_channels, -3),
        "weight",
        refit=_set(("out_channels", "weight", 0), ("in_channels", "weight", 1)),
        unit="channel",
    ),
    # The linear layer of GPT-2: the weight is transposed.
    "transformers.pytorch_utils.Conv1D": LayerKind(
        lambda m: (m.nf, -1),
        "weight",
        lambda m: 1,
        lambda m: 0,
        refit=_set(("nx", "weight", 0), ("nf", "weight", 1)),
        follower=_linear,
    ),
}

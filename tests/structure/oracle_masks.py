"""Removal done by hand from the slices alone, and the masked model that it must equal.

Nothing of the library's surgery is used: tensors are cut by their names in the state_dict, and the
attributes of the usual modules follow from the new shapes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.zoo_dense import blocks_left

NORMS = (nn.modules.batchnorm._NormBase,)
CONVS = (nn.modules.conv._ConvNd,)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every vector and every running statistic values of its own, none of them near zero.

    As constructed, norms are all ones and zeros: one unit's could be taken for another's.
    """
    generator = torch.Generator().manual_seed(seed)

    def values(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) + 0.5).to(like)

    def signs(like: Tensor) -> Tensor:
        return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # large biases would switch units off for good
                size = 0.25 if "bias" in name else 0.8
                parameter.copy_(values(parameter) * signs(parameter) * size)
        for module in model.modules():
            if isinstance(module, NORMS) and module.running_mean is not None:
                module.running_mean.copy_(
                    values(module.running_mean) * signs(module.running_mean) / 4
                )
                module.running_var.copy_(values(module.running_var) / 4)
    return model


def prune_copy(model: nn.Module, group: Any, units: Iterable[int]) -> nn.Module:
    """A copy in float64 without what `group.slices(units)` lists."""
    pruned = copied(model).double()
    tensors = pruned.state_dict(keep_vars=True)
    cuts: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for piece in group.slices(tuple(units)):
        # By the tensor, not by the key: tied tensors have several keys.
        cuts[id(tensors[piece.tensor])][piece.dim].update(piece.indices)

    # `before` keeps the old tensors alive, so that no new one gets an old one's id.
    before = list(tensors.values())
    replaced = {id(old): _cut(old, cuts[id(old)]) for old in before if id(old) in cuts}
    removed = {id(new): cuts[old] for old, new in replaced.items()}
    for module in pruned.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in list(owned.items()):
                if tensor is not None and id(tensor) in replaced:
                    # Not only into the dict: an RNN keeps a list of its weights as well.
                    setattr(module, name, replaced[id(tensor)])

    def gone(tensor: Tensor | None, dim: int) -> list[int]:
        return sorted(removed.get(id(tensor), {}).get(dim, ()))

    for module in pruned.modules():
        _follow(module, gone)
    for module in pruned.modules():
        if hasattr(module, "refit"):
            module.refit(gone)
    return pruned


def _cut(old: Tensor, cuts: Mapping[int, set[int]]) -> Tensor:
    new = old.detach()
    for dim, indices in cuts.items():
        if not all(0 <= i < old.shape[dim] for i in indices):
            raise IndexError(f"{sorted(indices)} along dim {dim} of {tuple(old.shape)}")
        kept = [i for i in range(old.shape[dim]) if i not in indices]
        new = new.index_select(dim, torch.tensor(kept, dtype=torch.long))
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.clone(), requires_grad=old.requires_grad)
    return new.clone()


def _follow(module: nn.Module, gone: Any) -> None:
    """The sizes that a module keeps beside its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = _source(module).shape
    elif isinstance(module, CONVS):
        _follow_convolution(module, gone)
    elif isinstance(module, NORMS) and _size(module) is not None:
        module.num_features = _size(module)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        rows = gone(module.weight, 0)
        width = module.num_channels // module.num_groups
        if any({*range(b * width, (b + 1) * width)} <= {*rows} for b in range(module.num_groups)):
            module.num_groups, _ = blocks_left(rows, module.num_groups, width)
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = _source(module).shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.RNNBase):
        module.hidden_size = module.weight_hh_l0.shape[1]
        module.input_size = module.weight_ih_l0.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        _follow_attention(module, gone)


def _source(module: nn.Module) -> Tensor:
    """The weight as stored: under weight norm, its direction; under others, what it is computed from."""
    if parametrize.is_parametrized(module, "weight"):
        held = module.parametrizations["weight"]
        return held.original1 if hasattr(held, "original1") else held.original
    for name in ("weight_orig", "weight_v"):  # before there were parametrizations
        if name in module._parameters:
            return module._parameters[name]
    return module.weight


def _size(norm: nn.Module) -> int | None:
    held = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    return None if held is None else held.shape[0]


def _follow_convolution(conv: nn.Module, gone: Any) -> None:
    weight = _source(conv)
    # Transposed or not, the groups lie one after the other on axis 0, and each has axis 1 to itself.
    old = conv.in_channels if conv.transposed else conv.out_channels
    if conv.groups > 1:
        rows = gone(weight, 0)
        width = old // conv.groups
        if any({*range(b * width, (b + 1) * width)} <= {*rows} for b in range(conv.groups)):
            conv.groups, _ = blocks_left(rows, conv.groups, width)
    sizes = weight.shape[0], weight.shape[1] * conv.groups
    if conv.transposed:
        conv.in_channels, conv.out_channels = sizes
    else:
        conv.out_channels, conv.in_channels = sizes


def _follow_attention(module: nn.MultiheadAttention, gone: Any) -> None:
    """Its own forward takes the inner width for the residual's; cut, it needs one that does not."""
    weight, inner = module.in_proj_weight, module.embed_dim
    rows, columns = gone(weight, 0), gone(weight, 1)
    if not rows and not columns and not gone(module.out_proj.weight, 0):
        return
    parts = [[r - p * inner for r in rows if r // inner == p] for p in range(3)]
    left = [blocks_left(part, module.num_heads, module.head_dim) for part in parts]
    cut_heads = {heads for heads, _ in left}
    if len(cut_heads) != 1:
        raise ValueError(f"queries, keys and values are left with {cut_heads} heads")
    (module.num_heads,) = cut_heads
    module.cut_scale = module.head_dim**-0.5  # zeros in their place leave the scale as it is
    module.cut_sizes = [heads * width for heads, width in left]
    module.embed_dim = weight.shape[1]
    module.forward = MethodType(_attend, module)


def _attend(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **how: Any
) -> Any:
    if any(how.get(name) is not None for name in ("attn_mask", "key_padding_mask")):
        raise NotImplementedError("masks")
    weights = self.in_proj_weight.split(self.cut_sizes)
    biases = self.in_proj_bias.split(self.cut_sizes)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    h = F.scaled_dot_product_attention(q, k, v, scale=self.cut_scale).transpose(1, 2).flatten(2)
    return F.linear(h, self.out_proj.weight, self.out_proj.bias), None


def masked_copy(
    model: nn.Module, group: Any, units: Iterable[int], *, silence: bool = False
) -> nn.Module:
    """A copy in float64 of the whole model, in which what reads the units reads zero.

    Zero is the activation, at the door of the layer that reads it: a weight may be computed from its parameters in
    any way. Only parameters that a model multiplies by itself are masked where they are.
    With `silence`, what makes and carries the units is zeroed too. Only so does a consumer without
    weights, such as the product of queries and keys, see zero.
    """
    masked = copied(model).double()
    tensors = masked.state_dict(keep_vars=True)
    buffers = {name for name, _ in masked.named_buffers()}
    for piece in group.slices(tuple(units)):
        computes = piece.tensor in buffers and piece.tensor.endswith(("_u", "_v"))
        if (piece.role == "reads" or silence) and not computes:
            module = masked.get_submodule(layer_of(piece.tensor))
            # A plain weight is zeroed too: functional code may read it, and then no door is passed.
            if not _mask_at_the_door(module, piece) or _is_plain(module):
                assert ".parametrizations." not in piece.tensor, piece
                indices = torch.tensor(piece.indices, dtype=torch.long)
                with torch.no_grad():
                    tensors[piece.tensor].index_fill_(piece.dim, indices, 0)
    return masked


def copied(model: nn.Module) -> nn.Module:
    """A copy, also of modules that keep a weight that they computed, with its graph."""
    held = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def layer_of(tensor: str) -> str:
    """The module whose weight a tensor is, or is computed into."""
    return f".{tensor}".rpartition(".")[0].partition(".parametrizations.")[0][1:]


def _is_plain(module: nn.Module) -> bool:
    """Whether it multiplies with the very parameter that it keeps."""
    own = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return type(module) in own and isinstance(module._parameters.get("weight"), nn.Parameter)


def _mask_at_the_door(module: nn.Module, piece: Any) -> bool:
    """Make the input or the output of a layer zero; False of modules that none knows."""
    transposed = isinstance(module, CONVS) and module.transposed
    if type(module) is nn.Embedding:
        axis, reads, makes = -1, None, 1
    elif isinstance(module, nn.Linear):
        axis, reads, makes = -1, 1, 0
    elif isinstance(module, CONVS) and module.groups == 1:
        axis, reads, makes = 1, 0 if transposed else 1, 1 if transposed else 0
    else:
        return False
    indices = torch.tensor(piece.indices, dtype=torch.long)
    called = type(module).__name__ != "NonDynamicallyQuantizableLinear"  # attention's own
    if piece.role == "reads":
        if piece.dim != reads or not called:
            return False
        module.register_forward_pre_hook(
            lambda _, args: (args[0].index_fill(axis, indices, 0), *args[1:])
        )
        return True
    if piece.dim != (makes if piece.tensor.rpartition(".")[2] != "bias" else 0) or not called:
        return False
    module.register_forward_hook(lambda _, args, output: output.index_fill(axis, indices, 0))
    return True


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer runs its written-out forward, and so the attention's."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The output for inputs in the model's own precision, in eval mode."""
    dtype = next(p.dtype for p in model.parameters())
    model.eval()
    with torch.no_grad(), no_fast_path():
        return model(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in leaves(value)]
    if isinstance(output, list | tuple):
        return [leaf for value in output for leaf in leaves(value)]
    return []


def relative_difference(a: Any, b: Any) -> float:
    """The largest difference of any entry, relative to the largest entry of that tensor of `b`.

    Infinite where shapes differ or something is not finite: no comparison passes by accident.
    """
    ours, theirs = leaves(a), leaves(b)
    if len(ours) != len(theirs) or not theirs:
        return float("inf")
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        if x.shape != y.shape or not (x.isfinite().all() and y.isfinite().all()):
            return float("inf")
        if y.numel():
            x, y = x.double(), y.double()
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)))
    return worst

"""What a model without some of its units must give: the original with zeros in their place, made here from scratch.

Nothing of this is the library's own check. Constants are made random first, or the comparison would be blind: a norm
of ones does not show which of its channels went.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lost = Mapping[str, Mapping[int, Iterable[int]]]  # tensor → dimension → indices of the original


def randomize_constants(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random numbers in place of constants (norms, biases, layer scales, statistics of batch norms), in place."""

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.ndim and bool((tensor == tensor.flatten()[0]).all()):
                # A scale of ones or 1e-6 becomes about one, zeros become small.
                tensor.copy_(
                    0.2 * draw(tensor) - 0.1 if not tensor.any() else 0.6 + 0.8 * draw(tensor)
                )
            elif tensor.ndim < 2:
                tensor.mul_(0.8 + 0.4 * draw(tensor))
            else:  # rows that are all alike (the decays of a state space)
                tensor.mul_(0.95 + 0.1 * draw(tensor))
        for name, buffer in model.named_buffers():
            kind = name.rpartition(".")[2]
            owner = model.get_submodule(name.rpartition(".")[0])
            if kind == "running_mean":
                buffer.copy_(0.2 * draw(buffer) - 0.1)
            elif kind == "running_var" or (kind == "weight" and "Frozen" in type(owner).__name__):
                buffer.copy_(0.6 + 0.8 * draw(buffer))
    return model


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors_of(part)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the worst of all outputs: the largest difference over the largest expected value; inf if shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not a.numel():
            continue
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        scale = b.abs().max().clamp(min=1e-30)
        worst = max(worst, float(((a - b).abs().max() / scale).nan_to_num(float("inf"))))
    return worst


def masked(original: nn.Module, lost: Lost) -> nn.Module:
    """A copy with zeros at all these slices."""
    model = copy.deepcopy(original)
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, dims in lost.items():
            for dim, indices in dims.items():
                target = length_of(tensors, name, dim)
                target.index_fill_(dim, torch.tensor(sorted(indices), dtype=torch.long), 0)
    return model


def length_of(tensors: Mapping[str, Tensor], name: str, dim: int) -> Tensor:
    """A weight; of a weight norm, along what it normalises, its length: a direction cannot be zero."""
    for direction, length in (("weight_v", "weight_g"), (".original1", ".original0")):
        lengths = tensors.get(name.removesuffix(direction) + length)
        fits = (
            lengths is not None
            and lengths.shape[dim : dim + 1] == tensors[name].shape[dim : dim + 1]
        )
        if lengths is not None and fits and name.endswith(direction):
            return lengths
    return tensors[name]


class KeptNorm(nn.Module):
    """The only meaning that a norm over fewer channels can have: over those that are left, and zero elsewhere."""

    def __init__(self, cut: nn.Module, kept: list[int], dim: int) -> None:
        super().__init__()
        self.cut, self.dim = cut, dim
        self.register_buffer("kept", torch.tensor(kept), persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = self.cut(x.index_select(self.dim, self.kept), *args, **kwargs)
        return torch.zeros_like(x).index_copy(self.dim, self.kept, made)


def masked_with_norms(original: nn.Module, lost: Lost, pruned: nn.Module) -> nn.Module:
    """As `masked`; norms over channels that went normalise over those that are left."""
    model = masked(original, lost)
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        own = [f"{name}.{p}".lstrip(".") for p, _ in module.named_parameters(recurse=False)]
        if "Norm" not in kind or "Batch" in kind or not any(0 in lost.get(p, {}) for p in own):
            continue
        tensor = next(p for p in own if 0 in lost.get(p, {}))
        gone = set(lost[tensor][0])
        size = model.get_parameter(tensor).shape[0]
        first = getattr(module, "data_format", "") == "channels_first"
        channels = isinstance(module, nn.GroupNorm) or "2d" in kind or first
        cut = copy.deepcopy(pruned.get_submodule(name))
        kept = [i for i in range(size) if i not in gone]
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, KeptNorm(cut, kept, 1 if channels else -1))
    return model


@contextmanager
def attention_widths(widths: list[int], replay: bool) -> Iterator[None]:
    """Record the width of each head that attention is called with; or replay them as what scales the softmax."""
    real, calls = F.scaled_dot_product_attention, iter(list(widths))

    def attend(q: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
        if not replay:
            widths.append(q.shape[-1])
        elif scale is None and (width := next(calls, None)):
            scale = width**-0.5
        return real(q, *args, scale=scale, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real

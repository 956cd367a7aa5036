"""Models that keep sizes as integers of their own, and how tests take units from them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, no_fast_path, randomise, relative_difference
from tracker import NeuronEngine

B, T, C, H = 2, 5, 12, 4  # batch, tokens, width, heads


class Attention(nn.Module):
    """Three projections, sizes as attributes, the scale kept."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(C, 24) for _ in range(3))
        self.out = nn.Linear(24, C)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        return self.out(h.reshape(x.shape[0], -1, self.num_heads * self.head_dim))


class Fused(Attention):
    """One projection for all three, its parts by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 72)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(b, n, -1))


class Split(Attention):
    """Parts by `split` with an attribute, heads by division."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 72)
        self.split_size = 24
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, x.size(-1) // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, self.qkv(x).split(self.split_size, dim=2))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(h.transpose(1, 2).flatten(2))


class Configured(nn.Module):
    """Two layers read one configuration."""

    class Layer(Attention):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.config = config
            del self.num_heads

        def heads(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return x + self.out(h.transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=4)
        self.layers = nn.ModuleList(self.Layer(self.config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Shaped(nn.Module):
    """A tuple attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 20), nn.Linear(20, C)
        self.shape = (4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu().view(*x.shape[:-1], *self.shape).transpose(-1, -2)
        return self.down(h.transpose(-1, -2).flatten(-2))


class Forgetful(nn.Module):
    """A unit that a cut at an attribute's place moves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.a, self.b = nn.Linear(C, 16), nn.Linear(10, C), nn.Linear(6, C)
        self.cut = 10

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.a(h[..., : self.cut]) + self.b(h[..., self.cut :])


class LiteralSlice(Forgetful):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.a(h[..., :10]) + self.b(h[..., 10:])


class LiteralView(Shaped):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu().view(2, 5, 4, 5)
        return self.down(h.transpose(-1, -2).transpose(-1, -2).flatten(-2))


class Rescaled(Attention):
    """The scale is made anew of the width at every call."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(B, T, -1))


class Reciprocal(Attention):
    """The scale is a float from the start, and queries are normalised: removal is not that of the masked model."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = (q.softmax(-1) @ k.transpose(-2, -1) * (1.0 / self.head_dim)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).flatten(2))


class DefaultScale(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedConv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        )


class OneHeadWidth(nn.Module):
    """Heads whose width is that of the whole divided by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.heads = nn.Linear(C, 12), nn.Linear(12, C), 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        h = h.view(*x.shape[:-1], self.heads, h.shape[-1] // self.heads)
        return self.down(h.flatten(-2))


class Torchs(nn.Module):
    """torch's own attention, called with masks and for its weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, H, **{"batch_first": True, **options})
        self.out = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, 3] = True
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        h, weights = self.attention(x, x, x, hidden, attn_mask=mask)
        return self.out(h) + weights.mean()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, H, 20, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(C, 4))


def tokens() -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def engine_of(model: nn.Module, x: Tensor) -> NeuronEngine:
    randomise(model, 0)
    engine = NeuronEngine()
    engine.track_model(model.eval(), "m", example_inputs=x)
    return engine


def groups_of(engine: NeuronEngine, kind: str | None = None) -> list[Any]:
    return [g for g in engine.structure.groups if g.prunable and kind in (None, g.kind)]


def output(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad(), no_fast_path():
        return copy.deepcopy(model).double().eval()(x.double())


def attributes_of(model: nn.Module) -> list[Any]:
    return [
        (type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple, float, str))})
        for m in model.modules()
    ]


def prune_each(build: Any, x: Tensor) -> dict[str, int]:
    """Remove a third of each group, and compare with the oracle; kinds and sizes of the groups.

    Of one model: what an undo left would show at the next group.
    """
    found = {}
    model = build()
    engine = engine_of(model, x)
    for group in groups_of(engine):
        count = max(1, group.size // 3 // group.multiple_of) * group.multiple_of
        units = list(range(group.size))[1::2][:count] if group.multiple_of == 1 else range(count)
        before, plain = attributes_of(model), copy.deepcopy(model)
        whole = output(model, x)
        engine.prune_units({group.name: list(units)})
        if group.exact:
            masks = [masked_copy(plain, group, units, silence=s) for s in (False, True)]
            after = output(model, x)
            assert min(relative_difference(after, output(m, x)) for m in masks) < 1e-9, group.name
        assert sum(p.numel() for p in model.parameters()) < sum(
            p.numel() for p in plain.parameters()
        )
        assert engine.structure.coverage > 0  # and it can be traced again
        engine.undo()
        assert attributes_of(model) == before
        assert relative_difference(output(model, x), whole) == 0
        found[f"{group.name} {group.kind}"] = group.size
    return found

"""Small models with every kind of wiring, for tests of structure and surgery.

Whoever builds one seeds first. A module whose forward uses a size from an attribute has
`refit(gone)`, called after its tensors were cut: `gone(tensor, dim)` lists the old indices that are
no longer there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Gone = Callable[[Tensor, int], list[int]]


@dataclass(frozen=True)
class Entry:
    """One model: how to build and feed it, and what its structure must and must not say."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    notes: str
    min_coverage: float | None = None
    expect_frozen: bool = False
    pinned: tuple[tuple[str, int], ...] = ()  # (tensor, dim) where nothing may be prunable
    words: tuple[str, ...] = ()  # one of these is in the reasons why not
    inexact: tuple[
        tuple[str, int], ...
    ] = ()  # (tensor, dim) of which no group may claim to be exact
    slow: bool = False


def blocks_left(removed: Sequence[int], blocks: int, width: int) -> tuple[int, int]:
    """How many blocks of which width are left of `blocks * width` rows.

    Either whole blocks have gone, or equally many rows of each.

    Raises:
        ValueError: neither is so.
    """
    counts = [0] * blocks
    for index in removed:
        counts[index // width] += 1
    if set(counts) <= {0, width}:
        return blocks - counts.count(width), width
    if len(set(counts)) == 1:
        return blocks, width - counts[0]
    raise ValueError(f"rows {list(removed)} are no rectangle of {blocks} blocks of {width}")


# Fully connected


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 10), nn.Linear(6, 7)
        self.head = nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], dim=-1))


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 20)
        self.a, self.b = nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, dim=-1)
        return self.a(F.relu(a)) + self.b(torch.tanh(b))


class SplitBySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [12, 8]
        self.first = nn.Linear(6, 20)
        self.a, self.b = nn.Linear(12, 3), nn.Linear(8, 3)

    def refit(self, gone: Gone) -> None:
        rows = gone(self.first.weight, 0)
        self.sizes = [12 - sum(r < 12 for r in rows), 8 - sum(r >= 12 for r in rows)]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.sizes, dim=-1)
        return self.a(F.relu(a)) + self.b(torch.tanh(b))


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.alias = self.shared  # a second key for the same tensors

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(F.relu(self.alias(F.relu(self.shared(h)))))


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(14, 6) / 2)
        self.b1 = nn.Parameter(torch.randn(14))
        self.w2 = nn.Parameter(torch.randn(11, 14) / 4)
        self.w3 = nn.Parameter(torch.randn(11, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.w1, self.b1))
        return torch.einsum("oi,ni->no", self.w2, h).tanh() @ self.w3


class EinsumHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 5) / 2)  # head, input, width
        self.down = nn.Parameter(torch.randn(4, 5, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,hid->nhd", x, self.up).relu()
        return torch.einsum("nhd,hdo->no", h, self.down)


class GatedMLP(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 14, out: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedGatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(6, 28), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DenseMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(GatedMLP(6, 8, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        outputs = [share[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        return torch.stack(outputs).sum(0)


class EinsumMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 5)
        self.w1 = nn.Parameter(torch.randn(5, 6, 8) / 2)
        self.w2 = nn.Parameter(torch.randn(5, 8, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        h = F.gelu(torch.einsum("nd,edh->neh", x, self.w1))
        return torch.einsum("ne,neo->no", share, torch.einsum("neh,eho->neo", h, self.w2))


class Between(nn.Module):
    """Linear, something to the hidden features, Linear."""

    def __init__(self, hidden: int, something: Callable[[Tensor], Tensor], read: int = 0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, hidden), nn.Linear(read or hidden, 3)
        self.something = something

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.something(self.first(x)))


class LiteralSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 20)
        self.a, self.b = nn.Linear(12, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.a(h[:, :12]) + self.b(h[:, 12:])


class LiteralView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(h.view(-1, 4, 6)).tanh().sum(1)


class ArgmaxControl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.table = nn.Parameter(torch.randn(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        y = self.last(h)
        if int(h.sum(0).argmax()) % 2:
            y = -y
        return y + self.table[h.argmax(-1)]


class BooleanMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h[:, h.mean(0) > 0].sum(-1, keepdim=True))


# Convolutional


def conv_bn(inside: int, out: int, **how: int) -> nn.Sequential:
    kernel = how.pop("kernel", 3)
    conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False, **how)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def pooled_head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class BasicBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        h += self.downsample(x)
        return F.relu(h)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv_bn(3, 12)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.last = nn.Conv2d(18, 8, 1)
        self.head = pooled_head(8)
        self.groups = 3

    def refit(self, gone: Gone) -> None:
        self.groups = self.grouped.groups

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.grouped(self.first(x)))
        n, c, height, width = h.shape
        h = h.view(n, self.groups, c // self.groups, height, width).transpose(1, 2)
        return self.head(F.relu(self.last(h.reshape(n, c, height, width))))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(pooled))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.middle = conv_bn(3, 6), conv_bn(6, 10, stride=2), conv_bn(10, 9)
        self.up = nn.ConvTranspose2d(9, 7, 2, stride=2)
        self.merge = conv_bn(13, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        h = F.relu(self.up(self.middle(self.down(skip))))
        return self.out(self.merge(torch.cat([skip, h], 1)))


# Sequences


class Attention(nn.Module):
    """Separate, fused or grouped queries, keys and values; heads by literal attributes."""

    def __init__(
        self,
        width: int = 16,
        heads: int = 4,
        head_dim: int = 4,
        kv_heads: int | None = None,
        fused: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kv_heads = heads, head_dim, kv_heads or heads
        inner, kv = heads * head_dim, self.kv_heads * head_dim
        if fused:
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k = nn.Linear(width, inner), nn.Linear(width, kv)
            self.v = nn.Linear(width, kv)
        self.out = nn.Linear(inner, width)
        self.fused, self.rotary = fused, rotary
        if rotary:
            steps = torch.arange(0, head_dim, 2).float() / head_dim
            self.register_buffer("inv_freq", 100.0**-steps)

    def refit(self, gone: Gone) -> None:
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        rows = gone(self.qkv.weight, 0) if self.fused else gone(self.k.weight, 0)
        rows = [r for r in rows if r < kv_heads * dim]
        self.kv_heads, self.head_dim = blocks_left(rows, kv_heads, dim)
        if self.fused:
            self.heads = self.kv_heads
        else:
            self.heads = (heads * dim - len(gone(self.q.weight, 0))) // self.head_dim

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[2]).to(self.inv_freq), self.inv_freq)
        angle = torch.cat([angle, angle], -1)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q = q.view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        repeats = self.heads // self.kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(h.transpose(1, 2).reshape(n, t, self.heads * self.head_dim))


class FreeAttention(nn.Module):
    """Widths of a head by -1, and a scale that is a number: every axis may be cut exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = nn.Linear(10, 15), nn.Linear(10, 15), nn.Linear(10, 12)
        self.out = nn.Linear(12, 10)

    def refit(self, gone: Gone) -> None:
        left = {
            blocks_left(rows, self.heads, width)[0]
            for rows, width in ((gone(self.k.weight, 0), 5), (gone(self.v.weight, 0), 4))
            if rows
        }
        if left:
            (self.heads,) = left

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            made.view(n, t, self.heads, -1).transpose(1, 2)
            for made in (self.q(x), self.k(x), self.v(x))
        )
        h = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v
        return self.out(h.transpose(1, 2).flatten(2))


class ScaledByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d = 12
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 10)
        self.out = nn.Linear(10, 4)

    def refit(self, gone: Gone) -> None:
        self.d -= len(gone(self.q.weight, 0))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / self.d**0.5
        q = self.q(x).view(x.shape[0], x.shape[1], self.d)
        weights = (q @ self.k(x).transpose(-1, -2) * scale).softmax(-1)
        return self.out(weights @ self.v(x))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, feed_forward: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Embedded(nn.Module):
    """Tokens in, logits out: everything between is the model's own."""

    def __init__(self, body: nn.Module, width: int = 16, tie: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.body = body
        self.head = nn.Linear(width, 11, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


class SelfAttention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **how: bool) -> None:
        super().__init__()
        self.rnn = kind(6, 10, batch_first=True, **how)
        self.head = nn.Linear(20 if how.get("bidirectional") else 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def feed_forward(width: int = 16, hidden: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def transformer(**how: bool | int | None) -> nn.Module:
    return Embedded(nn.Sequential(Block(Attention(**how), feed_forward()), nn.LayerNorm(16)))


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as build

    return build(weights=None, num_classes=10)


def cumsum(h: Tensor) -> Tensor:
    return F.relu(h).cumsum(-1)


def topk(h: Tensor) -> Tensor:
    return h.topk(6, dim=-1).values


def softmax(h: Tensor) -> Tensor:
    return h.softmax(-1)


def rows(width: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(13, width),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


def sequences(width: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 5, width),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (2, 5)),)


def mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        middle = [make() for make in between]
        return nn.Sequential(
            nn.Linear(6, 16), *middle, nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3)
        )

    return build


def stack(*makes: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in makes))


FIRST = (("first.weight", 0), ("last.weight", 1))

ZOO: dict[str, Entry] = {
    # Fully connected
    "mlp": Entry(mlp(nn.ReLU), rows(6), "Linear and ReLU", 0.9),
    "mlp_batchnorm": Entry(mlp(lambda: nn.BatchNorm1d(16), nn.ReLU), rows(6), "BatchNorm1d", 0.9),
    "mlp_gelu": Entry(mlp(nn.GELU), rows(6), "GELU", 0.9),
    "mlp_prelu": Entry(mlp(lambda: nn.PReLU(16)), rows(6), "a slope per unit", 0.9),
    "mlp_residual": Entry(
        stack(
            lambda: nn.Linear(6, 12),
            lambda: Residual(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)),
            lambda: Residual(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12)),
            lambda: nn.Linear(12, 3),
        ),
        rows(6),
        "a residual stream of plain sums",
        0.9,
    ),
    "two_branches": Entry(TwoBranches, rows(6), "concatenation into a Linear", 0.9),
    "chunked": Entry(Chunked, rows(6), "halves of a Linear's output, of equal size", 0.9),
    "split_by_size": Entry(SplitBySize, rows(6), "split by sizes in an attribute"),
    "weight_norm": Entry(
        lambda: nn.Sequential(
            weight_norm(nn.Linear(6, 14)), nn.ReLU(), nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 3)
        ),
        rows(6),
        "a normalised weight, as a parametrization",
        0.8,
    ),
    "weight_norm_reads": Entry(
        lambda: nn.Sequential(
            nn.Linear(6, 14), nn.ReLU(), weight_norm(nn.Linear(14, 9)), nn.ReLU(), nn.Linear(9, 3)
        ),
        rows(6),
        "a normalised weight whose columns read the units: without one, its norm is another",
        inexact=(("0.weight", 0), ("2.parametrizations.weight.original1", 1)),
    ),
    "used_twice": Entry(UsedTwice, rows(6), "one module called twice, under two names", 0.9),
    "raw_parameters": Entry(RawParameters, rows(6), "F.linear, einsum and @ on parameters", 0.9),
    "einsum_heads": Entry(EinsumHeads, rows(6), "parameters of three axes", 0.9),
    "gated_mlp": Entry(lambda: GatedMLP(6, 14, 3), rows(6), "SwiGLU", 0.9),
    "gated_mlp_fused": Entry(FusedGatedMLP, rows(6), "SwiGLU of one Linear", 0.9),
    "moe_dense": Entry(DenseMoE, rows(6), "every expert computed, softmax gate", 0.8),
    "moe_einsum": Entry(
        EinsumMoE,
        rows(6),
        "experts along an axis: one less changes the shares of the others",
        inexact=(("router.weight", 0), ("w1", 0), ("w2", 0)),
    ),
    # Convolutional
    "conv_flatten": Entry(
        stack(
            lambda: nn.Conv2d(3, 7, 3, padding=1),
            nn.ReLU,
            lambda: nn.MaxPool2d(4),
            nn.Flatten,
            lambda: nn.Linear(28, 5),
        ),
        images,
        "a channel is four columns of the Linear",
        0.9,
    ),
    "conv_bn": Entry(
        stack(lambda: conv_bn(3, 8), lambda: conv_bn(8, 10), lambda: pooled_head(10)),
        images,
        "convolution, batch norm, ReLU",
        0.9,
    ),
    "resnet_blocks": Entry(
        stack(
            lambda: conv_bn(3, 8),
            lambda: BasicBlock(8, 8, 1),
            lambda: BasicBlock(8, 12, 2),
            lambda: pooled_head(12),
        ),
        images,
        "basic blocks, one with a downsample, sums and ReLU in place",
        0.9,
    ),
    "depthwise_separable": Entry(
        stack(
            lambda: conv_bn(3, 8),
            lambda: conv_bn(8, 8, groups=8),
            lambda: conv_bn(8, 12, kernel=1),
            lambda: pooled_head(12),
        ),
        images,
        "depthwise and pointwise convolution",
        0.9,
    ),
    "grouped_conv": Entry(
        stack(
            lambda: conv_bn(3, 12),
            lambda: conv_bn(12, 18, groups=3),
            lambda: nn.Conv2d(18, 7, 3),
            lambda: pooled_head(7),
        ),
        images,
        "three groups",
        0.8,
    ),
    "conv_transpose": Entry(
        stack(
            lambda: conv_bn(3, 6),
            lambda: nn.ConvTranspose2d(6, 8, 2, stride=2),
            lambda: nn.BatchNorm2d(8),
            nn.ReLU,
            lambda: nn.Conv2d(8, 2, 1),
        ),
        images,
        "a transposed convolution has its inputs first",
        0.8,
    ),
    "channel_shuffle": Entry(ShuffleNet, images, "the channels of the groups interleaved", 0.5),
    "squeeze_excite": Entry(
        stack(lambda: conv_bn(3, 8), lambda: SqueezeExcite(8, 4), lambda: pooled_head(8)),
        images,
        "a gate per channel",
        0.9,
    ),
    "unet": Entry(UNet, images, "a skip joined by concatenation", 0.9),
    "group_norm": Entry(
        stack(
            lambda: nn.Conv2d(3, 12, 3),
            lambda: nn.GroupNorm(3, 12),
            nn.ReLU,
            lambda: nn.Conv2d(12, 7, 3),
            nn.ReLU,
            lambda: pooled_head(7),
        ),
        images,
        "a norm over the channels of a group",
    ),
    "conv1d": Entry(
        stack(
            lambda: nn.Conv1d(6, 9, 3, padding=1),
            lambda: nn.BatchNorm1d(9),
            nn.ReLU,
            lambda: nn.Conv1d(9, 7, 3, dilation=2, padding=2),
            nn.GELU,
            lambda: nn.AdaptiveAvgPool1d(1),
            nn.Flatten,
            lambda: nn.Linear(7, 3),
        ),
        lambda: (torch.randn(2, 6, 12),),
        "one spatial axis",
        0.9,
    ),
    "resnet18": Entry(
        resnet18, lambda: (torch.randn(1, 3, 64, 64),), "torchvision's own", 0.95, slow=True
    ),
    # Sequences
    "transformer": Entry(
        transformer,
        tokens,
        "pre-norm; separate q, k, v; heads by view",
        0.5,
        inexact=(("embedding.weight", 1), ("body.1.weight", 0)),
    ),
    "transformer_fused": Entry(lambda: transformer(fused=True), tokens, "fused q, k, v", 0.4),
    "transformer_gqa": Entry(
        lambda: transformer(kv_heads=2), tokens, "two query heads share keys and values", 0.4
    ),
    "transformer_rope": Entry(
        lambda: transformer(rotary=True), tokens, "dimensions i and i + d/2 turn together", 0.4
    ),
    "free_attention": Entry(
        FreeAttention, sequences(10), "heads of width -1, a literal scale: all exact", 0.5
    ),
    "scaled_by_attribute": Entry(
        ScaledByAttribute,
        sequences(8),
        "a scale of 1/sqrt(self.d), which is no longer d when units go",
        inexact=(("q.weight", 0), ("k.weight", 0)),
    ),
    "multihead_attention": Entry(
        lambda: nn.Sequential(nn.Linear(6, 16), SelfAttention(16), nn.Linear(16, 3)),
        sequences(6),
        "nn.MultiheadAttention, whose inner width is the residual's",
    ),
    "encoder_layer": Entry(
        lambda: Embedded(
            nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True)
        ),
        tokens,
        "nn.TransformerEncoderLayer, post-norm",
        0.3,
        inexact=(("embedding.weight", 1),),
    ),
    "tied_embedding": Entry(
        lambda: Embedded(Residual(*feed_forward()), tie=True),
        tokens,
        "the head is the embedding",
        0.8,
    ),
    "lstm": Entry(lambda: Recurrent(nn.LSTM), sequences(6), "four gates a unit, read by itself"),
    "lstm_bidirectional": Entry(
        lambda: Recurrent(nn.LSTM, bidirectional=True), sequences(6), "two directions of one size"
    ),
    "gru": Entry(lambda: Recurrent(nn.GRU), sequences(6), "three gates a unit"),
    # What the forward's own code pins, or an operation mixes by position
    "literal_slice": Entry(
        LiteralSlice,
        rows(6),
        "h[:, :12]",
        expect_frozen=True,
        pinned=(("a.weight", 1),),  # what 12: takes may go
        words=("slice", "narrow", "getitem", "[:, :12]"),
    ),
    "literal_view": Entry(
        LiteralView,
        rows(5),
        "h.view(-1, 4, 6)",
        expect_frozen=True,
        pinned=FIRST,
        words=("view", "reshape"),
    ),
    "cumsum": Entry(
        lambda: Between(10, cumsum),
        rows(6),
        "a running sum over the features",
        expect_frozen=True,
        pinned=FIRST,
        words=("cumsum",),
    ),
    "topk": Entry(
        lambda: Between(10, topk, read=6),
        rows(6),
        "the largest features, by rank",
        expect_frozen=True,
        pinned=FIRST,
        words=("topk", "top_k"),
    ),
    "argmax_control": Entry(
        ArgmaxControl,
        rows(6),
        "the largest unit's number decides",
        expect_frozen=True,
        pinned=(*FIRST, ("table", 0)),
        words=("argmax", "index", "item"),
    ),
    "boolean_mask": Entry(
        BooleanMask,
        rows(6),
        "features chosen by their values",
        expect_frozen=True,
        pinned=(("first.weight", 0),),
        words=("index", "mask", "nonzero"),
    ),
    "softmax_units": Entry(
        lambda: Between(10, softmax), rows(6), "softmax over hidden units", inexact=FIRST
    ),
}

"""Small models with every kind of wiring, for tests of structure and surgery.

Whoever builds one seeds first. A module whose forward uses a size from an attribute has
`refit(gone)`, called after its tensors were cut: `gone(tensor, dim)` lists the old indices that are
no longer there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.zoo_computed import Squashed, UnitRows, computed, plain_weight_norm
from tests.zoo_dense import (
    ArgmaxControl,
    Between,
    BooleanMask,
    Chunked,
    DenseMoE,
    EinsumHeads,
    EinsumMoE,
    FusedGatedMLP,
    GatedMLP,
    LiteralSlice,
    LiteralView,
    RawParameters,
    Residual,
    SplitBySize,
    TwoBranches,
    UsedTwice,
)
from tests.zoo_images import (
    BasicBlock,
    ShuffleNet,
    SqueezeExcite,
    UNet,
    conv_bn,
    pooled_head,
    resnet18,
)
from tests.zoo_sequences import (
    Embedded,
    FreeAttention,
    Recurrent,
    ScaledByAttribute,
    SelfAttention,
    feed_forward,
    transformer,
)


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
    "weight_norm_old": Entry(
        lambda: nn.Sequential(
            plain_weight_norm(nn.Linear(6, 14)),
            nn.ReLU(),
            plain_weight_norm(nn.Linear(14, 9)),
            nn.ReLU(),
            nn.Linear(9, 3),
        ),
        rows(6),
        "a normalised weight, computed by a hook",
        0.8,
        inexact=(("0.weight_v", 0), ("2.weight_v", 1)),
    ),
    "spectral_norm": Entry(
        lambda: nn.Sequential(
            nn.Linear(6, 14), nn.ReLU(), spectral_norm(nn.Linear(14, 9)), nn.ReLU(), nn.Linear(9, 3)
        ),
        rows(6),
        "divided by its largest singular value, which each row and column has a part in",
        0.8,
        inexact=(("0.weight", 0), ("4.weight", 1)),
    ),
    "spectral_norm_old": Entry(
        lambda: nn.Sequential(
            nn.Linear(6, 14),
            nn.ReLU(),
            nn.utils.spectral_norm(nn.Linear(14, 9)),
            nn.ReLU(),
            nn.Linear(9, 3),
        ),
        rows(6),
        "the same, computed by a hook",
        0.8,
        inexact=(("0.weight", 0), ("4.weight", 1)),
    ),
    "parametrized": Entry(
        lambda: nn.Sequential(
            computed(nn.Linear(6, 14), Squashed()),
            nn.ReLU(),
            computed(nn.Linear(14, 9), Squashed()),
            nn.ReLU(),
            computed(nn.Linear(9, 7), UnitRows()),
            nn.ReLU(),
            nn.Linear(7, 3),
        ),
        rows(6),
        "parametrizations of the user's own: number by number, and rows of length one",
        0.8,
        inexact=(("2.bias", 0),),
    ),
    "parametrized_conv": Entry(
        lambda: nn.Sequential(
            spectral_norm(nn.Conv2d(3, 7, 3)),
            nn.ReLU(),
            computed(nn.Conv2d(7, 6, 3), Squashed()),
            nn.ReLU(),
            weight_norm(nn.Conv2d(6, 5, 3)),
            nn.ReLU(),
            pooled_head(5),
        ),
        images,
        "computed filters",
        0.7,
        inexact=(("0.bias", 0), ("2.bias", 0)),
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

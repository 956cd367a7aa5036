"""Models of the zoo for sequences: attention and recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_dense import Gone, blocks_left


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

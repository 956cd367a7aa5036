"""Fully connected models of the zoo, and those whose own code stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gone = Callable[[Tensor, int], list[int]]


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

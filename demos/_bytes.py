"""A small language model of bytes, and the standard library's source to train it on."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

WINDOW = 128
BATCH = 16
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3"}


class Block(nn.Module):
    """Attention and `hidden` GELU neurons on a residual stream of width `d`."""

    def __init__(self, d: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = d // heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, positions, d)."""
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(b, t, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The next byte, from those before it."""

    def __init__(
        self, d: int = 128, heads: int = 4, depth: int = 4, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, d), nn.Embedding(WINDOW, d)
        self.blocks = nn.ModuleList(Block(d, heads, hidden or 4 * d) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 256)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, positions) of bytes → logits (batch, positions, 256)."""
        y = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))


class Source:
    """Windows of the standard library's source. Every tenth file is for testing only."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(
            p for p in root.rglob("*.py") if LEFT_OUT.isdisjoint(p.relative_to(root).parts)
        )
        parts = [p.read_bytes() for p in files]
        self.train = _tensor(b"".join(p for i, p in enumerate(parts) if i % 10))
        self.test = _tensor(b"".join(parts[::10]))

    def batches(self, seed: int, count: int, test: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows and, at each place, the next byte: (BATCH, WINDOW) both."""
        data = self.test if test else self.train
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            at = torch.randint(len(data) - WINDOW, (BATCH,), generator=generator)
            rows = data[at[:, None] + torch.arange(WINDOW + 1)].long()
            yield rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def trained(source: Source, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1
    )
    batches = source.batches(seed, steps)
    for x, y in tqdm(batches, f"Training gpt, seed {seed}", steps, leave=False, disable=None):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, source: Source, batches: int = 40) -> float:
    """Per byte, on files that were not trained on; the same windows for every model."""
    losses = [loss_of(model, x, y) for x, y in source.batches(12345, batches, test=True)]
    return float(torch.stack(losses).mean().exp())


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)

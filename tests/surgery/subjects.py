"""Small models in mid-training, and what must hold of them after every change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tracker import NeuronEngine


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def mlp(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), act(), nn.Linear(12, 9), act(), nn.Linear(9, 4))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (300, 6)),
    "conv": (conv, (60, 1, 12, 12)),
    "gated": (Gated, (300, 6)),
    "residual": (Residual, (300, 6)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
}


def prepared(name: str, optimizer: str = "Adam") -> tuple[Any, ...]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    opt = OPTIMIZERS[optimizer](model.parameters())
    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs=x[:8])
    engine.attach_optimizer(opt)
    for _ in range(3):
        train(model, opt, x)
    return model.eval(), opt, engine, x


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor) -> float:
    loss = model(x).square().mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    return float(loss.detach())


def snapshot(model: nn.Module, opt: torch.optim.Optimizer) -> list[Any]:
    states = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in opt.state[p].items()}
        for p in model.parameters()
        if p in opt.state
    ]
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    held = [[id(p) for p in g["params"]] for g in opt.param_groups]
    return [tensors, states, held, [id(p) for p in model.parameters()], str(model)]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def holds_exactly_the_live(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    held = [id(p) for g in opt.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())

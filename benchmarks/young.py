"""Does a network that changes itself from its first steps give up what it would have needed later?

    python benchmarks/young.py                   # three seeds of four tasks; a quarter of an hour
    python benchmarks/young.py --seeds 3 --write       # and its part of docs/self_modification.md

The default policy, whose first look comes after 200 steps, with Adam: *spirals*, three of them (2-64-64-3, rate 3e-4);
*teacher*, the classes of a random network (20-64-64-10, rate 2e-4); *images*, the embedded sample of Fashion-MNIST
(784-128-64-10, rate 1e-3); *short*: the largest of three numbers by size (8-48-48-3, rate 5e-3), 150 steps in all,
which the policy is told: its first look comes after 15. *Prices of now*: units go by what they cost the loss at once.
Data are fixed, seeds are those of weights and batches.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch
from _common import section
from torch import Tensor, nn
from tqdm import tqdm

from data.fashion_mnist import load_fashion_mnist, normalised
from tracker import NeuronEngine
from tracker.training import policy

PAGE = ROOT / "docs" / "self_modification.md"
BATCH = 64


class Data(NamedTuple):
    """To train and to test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def spirals() -> Data:
    """Three arms of one and a half turns, in noise."""
    random = torch.Generator().manual_seed(5)
    arm, radius = (
        torch.randint(0, 3, (6_000,), generator=random),
        torch.rand(6_000, generator=random),
    )
    angle = 9 * radius + 2 * math.pi / 3 * arm + 0.12 * torch.randn(6_000, generator=random)
    x = 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return Data(x[:4_000], arm[:4_000], x[4_000:], arm[4_000:])


def teacher() -> Data:
    """The largest of ten outputs of a random 20-24-24-10 network."""
    random = torch.Generator().manual_seed(123)
    made = mlp((20, 24, 24, 10))
    with torch.no_grad():
        for p in made.parameters():
            scale = 1.6 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.5
            p.copy_(scale * torch.randn(p.shape, generator=random))
        x = torch.randn(6_000, 20, generator=random)
        y = made(x)
    label = (y - y.mean(0)).argmax(1)
    return Data(x[:4_000], label[:4_000], x[4_000:], label[4_000:])


def short() -> Data:
    """Which of three numbers is the largest, whatever its sign; five others say nothing."""
    x = torch.randn(3_000, 8, generator=torch.Generator().manual_seed(7))
    y = x[:, :3].abs().argmax(1)
    return Data(x[:2_000], y[:2_000], x[2_000:], y[2_000:])


def images() -> Data:
    """The embedded sample, whatever else there is."""
    with tempfile.TemporaryDirectory() as empty:
        found = load_fashion_mnist(empty, download=False, system_copy=empty)
    x, test_x = (normalised(i, flatten=True) for i in (found.train_images, found.test_images))
    return Data(x, found.train_labels, test_x, found.test_labels)


@dataclass(frozen=True)
class Task:
    """Data, a network, and how it is trained; `told`: the policy knows for how many steps."""

    data: Callable[[], Data]
    widths: tuple[int, ...]
    rate: float
    steps: int
    told: bool = False


TASKS = {
    "spirals": Task(spirals, (2, 64, 64, 3), 3e-4, 6_000),
    "teacher": Task(teacher, (20, 64, 64, 10), 2e-4, 4_000),
    "images": Task(images, (784, 128, 64, 10), 1e-3, 1_600),
    "short": Task(short, (8, 48, 48, 3), 5e-3, 150, told=True),
}


def train(task: Task, data: Data, seed: int, changes: bool) -> tuple[float, int]:
    """Test accuracy and parameters at the end."""
    torch.manual_seed(seed)
    model = mlp(task.widths)
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    engine = NeuronEngine()
    engine.track_model(model, "young", example_inputs=data.x[:16])
    engine.attach_optimizer(optimizer)
    if changes:
        engine.start_self_modification(steps=task.steps if task.told else None)
    order, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(task.steps):
        if len(left) < BATCH:
            left = torch.randperm(len(data.x), generator=order)
        batch, left = left[:BATCH], left[BATCH:]
        loss = nn.functional.cross_entropy(model(data.x[batch]), data.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)
    with torch.no_grad():
        right = model(data.test_x).argmax(1) == data.test_y
    return float(right.float().mean()), sum(p.numel() for p in model.parameters())


def _written(name: str) -> list[str]:
    """The row of a task on the page."""
    _, _, part = PAGE.read_text(encoding="utf-8").partition("## Young networks\n")
    return [
        line for line in part.partition("\n## ")[0].splitlines() if line.startswith(f"| {name} |")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(TASKS), help="tasks; the rows of others stay")
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    usual = policy.weighed
    rows = {name: rest for name in TASKS for rest in _written(name)}
    lines = [
        "| task | untouched | parameters | default policy | parameters | prices of now | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, task in TASKS.items():
        if name not in options.only.split(","):
            lines += [rows[name]] if name in rows else []
            continue
        data, cells = task.data(), [name]
        for way in ("untouched", "default policy", "prices of now"):
            policy.weighed = usual if way == "default policy" else lambda errors, *rest: errors
            seeds = tqdm(range(options.seeds), f"{name}, {way}", leave=False, disable=None)
            results = [train(task, data, seed, way != "untouched") for seed in seeds]
            told, sizes = zip(*results, strict=True)
            mean = sum(told) / len(told)
            spread = f" ({min(told):.1%} to {max(told):.1%})" if len(told) > 1 else ""
            cells += [f"{mean:.1%}{spread}", f"{sum(sizes) / len(sizes):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        tqdm.write(lines[-1])
    policy.weighed = usual
    if options.write:
        made = f"{datetime.date.today()}, torch {torch.__version__}, {options.seeds} seeds"
        told_by = f"{made}: mean (range) of the test accuracy. `benchmarks/young.py`."
        section(PAGE, "Young networks", f"{told_by}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

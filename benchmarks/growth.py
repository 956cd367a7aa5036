"""Growing a hidden layer in mid-training: what the loss does, beside what people do by hand.

    python benchmarks/growth.py             # 8 -> 32 hidden units, 2 seeds
    python benchmarks/growth.py --write     # and docs/growth.md

784-h-64-10 with ReLU, Adam 1e-3, batch 128, Fashion-MNIST: three epochs, growth, three more. "spike" is the largest
excess of the loss of a training batch over that of the same network left as it is, on the same batches, in 50 steps.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine

PAGE = ROOT / "docs" / "growth.md"
Pair = tuple[nn.Module, torch.optim.Optimizer]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def step(pair: Pair, batch: tuple[Tensor, Tensor]) -> float:
    model, optimizer = pair
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def nothing(pair: Pair, to: int, batches: list[Any]) -> Pair:
    return pair


def new_adam(pair: Pair, to: int, batches: list[Any]) -> Pair:
    return pair[0], torch.optim.Adam(pair[0].parameters())


def new_layers(pair: Pair, to: int, batches: list[Any]) -> Pair:
    """Layers of the new size with fresh weights, and a new optimizer."""
    model: Any = pair[0]
    model.fc1, model.fc2 = nn.Linear(784, to), nn.Linear(to, 64)
    return model, torch.optim.Adam(model.parameters())


def split(pair: Pair, to: int, batches: list[Any]) -> Pair:
    """Net2Wider (Chen et al., 2016): copies of neurons with a little noise share their outgoing weights."""
    model: Any = pair[0]
    old1, old2 = model.fc1, model.fc2
    pick = torch.cat(
        [
            torch.arange(old1.out_features),
            torch.randint(old1.out_features, (to - old1.out_features,)),
        ]
    )
    times = torch.bincount(pick, minlength=old1.out_features)[pick]
    model.fc1, model.fc2 = nn.Linear(784, to), nn.Linear(to, 64)
    with torch.no_grad():
        model.fc1.weight.copy_(old1.weight[pick] + 1e-2 * old1.weight.std() * torch.randn(to, 784))
        model.fc1.bias.copy_(old1.bias[pick])
        model.fc2.weight.copy_(old2.weight[:, pick] / times)
        model.fc2.bias.copy_(old2.bias)
    return model, torch.optim.Adam(model.parameters())


def grown(directions: bool) -> Callable[[Pair, int, list[Any]], Pair]:
    def grow(pair: Pair, to: int, batches: list[Any]) -> Pair:
        model: Any = pair[0]
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=batches[0][0])
        engine.attach_optimizer(pair[1])
        extra: dict[str, Any] = {}
        if directions:
            extra = {
                "batches": batches,
                "loss": lambda out, b: nn.functional.cross_entropy(out, b[1]),
            }
        engine.expand_layer("fc1", to - model.fc1.out_features, **extra)
        return pair

    return grow


METHODS: dict[str, Callable[[Pair, int, list[Any]], Pair]] = {
    "no growth": nothing,
    "no growth, Adam re-created": new_adam,
    "layers and Adam re-created": new_layers,
    "Net2Wider, Adam re-created": split,
    "expand_layer": grown(False),
    "expand_layer, gradient directions": grown(True),
}


def measure(start: int, to: int, seed: int, train: Any, test: Any) -> dict[str, dict[str, float]]:
    set_seed(seed)
    model = FashionMLP([start, 64])
    pair: Pair = (model, torch.optim.Adam(model.parameters()))
    for _ in range(3):
        for batch in train:
            step(pair, batch)
    statistics = [b for b, _ in zip(train, range(80), strict=False)]
    first = [b for b, _ in zip(train, range(50), strict=False)]
    found: dict[str, dict[str, float]] = {}
    calm: list[float] = []
    for name, change in tqdm(METHODS.items(), desc=f"{start} -> {to}, seed {seed}", leave=False):
        set_seed(seed + 100)
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters())
        optimizer.load_state_dict(copy.deepcopy(pair[1].state_dict()))
        before = evaluate(own, test)[0]
        after_pair = change((own, optimizer), to, statistics)
        after = evaluate(after_pair[0], test)[0]
        after_pair[0].train()
        losses = [step(after_pair, batch) for batch in first]
        calm = losses if name == "no growth" else calm
        for _ in range(3):
            for batch in train:
                step(after_pair, batch)
        loss, accuracy = evaluate(after_pair[0], test)
        found[name] = {
            "at once": after - before,
            "spike": max(a - b for a, b in zip(losses, calm, strict=True)),
            "loss": loss,
            "accuracy": accuracy,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--sizes", default="8-32,64-128")
    parser.add_argument("--write", action="store_true", help="write docs/growth.md")
    options = parser.parse_args()
    train, test = get_data_loaders(batch_size=128, train_limit=options.samples)
    lines = [
        "| hidden units | method | change of the test loss at once | spike | test loss after 3 epochs | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for sizes in options.sizes.split(","):
        start, to = map(int, sizes.split("-"))
        runs = [measure(start, to, seed, train, test) for seed in range(options.seeds)]
        for name in METHODS:
            row = {k: mean(r[name][k] for r in runs) for k in runs[0][name]}
            lines.append(
                f"| {start} to {to} | {name} | {row['at once']:+.1e} | {row['spike']:+.3f} | {row['loss']:.4f} | "
                f"{row['accuracy']:.2%} |"
            )
    text = "\n".join(lines)
    print(text)
    if options.write:
        PAGE.write_text(
            f"# Growth in mid-training\n\nMade by `benchmarks/growth.py` on {datetime.date.today()}, torch "
            f"{torch.__version__}, {os.cpu_count()} cores, {options.seeds} seeds. 784-h-64-10 with ReLU, Adam 1e-3, "
            "Fashion-MNIST: three epochs, growth of h, three more. Spike: the largest excess of a training batch's "
            "loss over that of the network left as it is, on the same batches, in 50 steps.\n\n"
            + text
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

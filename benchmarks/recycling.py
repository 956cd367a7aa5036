"""Neurons that fell silent in mid-training get a new start: what that is worth, beside what people do by hand.

    python benchmarks/recycling.py             # 3 seeds
    python benchmarks/recycling.py --write     # and docs/recycling.md

Twelve tasks in a row: Fashion-MNIST with the pixels permuted anew, 6,000 samples each for two epochs; 784-128-128-10
with ReLU, Adam 5e-3, batch 64. A neuron is dormant where the mean of |h| is at most a tenth of its layer's (Sokar et
al., 2023). Every 100 steps the dormant ones are recycled.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.fashion_mnist import load_fashion_mnist, normalised
from fashion_mnist_mlp import FashionMLP, set_seed
from tracker import NeuronEngine

PAGE = ROOT / "docs" / "recycling.md"
TASKS, SAMPLES, EPOCHS, EVERY, BATCH = 12, 6_000, 2, 100, 64
DORMANT = 0.1
HIDDEN = (("fc1", "fc2"), ("fc2", "fc_out"))  # layers, and what reads them
Silent = dict[str, list[int]]


@dataclass
class Run:
    """A model in training."""

    model: Any
    optimizer: torch.optim.Optimizer
    engine: NeuronEngine | None = None


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-3)


@torch.no_grad()
def dormant(model: nn.Module, images: Tensor) -> Silent:
    """Dormant neurons of each hidden layer on these images."""
    found: Silent = {}
    x = images
    for name, _ in HIDDEN:
        x = torch.relu(model.get_submodule(name)(x))
        activity = x.mean(0)
        found[name] = (activity <= DORMANT * activity.mean()).nonzero().flatten().tolist()
    return found


def nothing(run: Run, silent: Silent, images: Tensor) -> None:
    """Let them be."""


@torch.no_grad()
def redo(run: Run, silent: Silent, images: Tensor, second: bool = False) -> None:
    """ReDo (Sokar et al., 2023) as one ports it to torch's Adam: fresh weights, zero moments, the step count shared.

    second: The second moments are their tensors' means, so that the first steps are no larger than others.
    """
    for layer, reader in HIDDEN:
        chosen = silent[layer]
        made, read = run.model.get_submodule(layer), run.model.get_submodule(reader)
        fresh = nn.Linear(made.in_features, made.out_features)
        made.weight[chosen], made.bias[chosen] = fresh.weight[chosen], fresh.bias[chosen]
        read.weight[:, chosen] = 0
        for parameter, at in (
            (made.weight, chosen),
            (made.bias, chosen),
            (read.weight, (slice(None), chosen)),
        ):
            for key in ("exp_avg", "exp_avg_sq"):
                state = run.optimizer.state[parameter][key]
                state[at] = state.mean() if second and key == "exp_avg_sq" else 0


def recycle(run: Run, silent: Silent, images: Tensor) -> None:
    """This library."""
    if run.engine is None:
        run.engine = NeuronEngine()
        run.engine.track_model(run.model, "m", example_inputs=images[:BATCH])
        run.engine.attach_optimizer(run.optimizer)
    run.engine.calibrate([images])
    run.engine.recycle_neurons({k: v for k, v in silent.items() if v})


METHODS: dict[str, Callable[[Run, Silent, Tensor], None]] = {
    "none": nothing,
    "Adam re-created at each task": nothing,
    "ReDo, moments zeroed": redo,
    "ReDo, second moments the mean": partial(redo, second=True),
    "recycle_neurons": recycle,
}


def life(method: str, seed: int, data: dict[str, Tensor], tasks: int) -> dict[str, float]:
    """All tasks, one after the other."""
    set_seed(seed)
    model = FashionMLP([128, 128])
    run = Run(model, adam(model))
    order = torch.Generator().manual_seed(1000 + seed)  # the same tasks for every method
    accuracies, seconds, recycled, steps = [], [], 0, 0
    begun = time.perf_counter()
    judging = 0.0
    for task in tqdm(range(tasks), f"{method}, seed {seed}", leave=False, disable=None):
        pixels = torch.randperm(784, generator=order)
        chosen = torch.randperm(len(data["train"]), generator=order)[:SAMPLES]
        images, labels = data["train"][chosen][:, pixels], data["train labels"][chosen]
        if task and method.startswith("Adam"):
            run.optimizer = adam(model)
        for _ in range(EPOCHS):
            for at in torch.randperm(SAMPLES, generator=order).split(BATCH):
                run.optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[at]), labels[at]).backward()
                run.optimizer.step()
                steps += 1
                if steps % EVERY == 0:
                    seen = images[:1000]
                    silent = dormant(model, seen)
                    start = time.perf_counter()
                    if any(silent.values()):
                        METHODS[method](run, silent, seen)
                        recycled += sum(map(len, silent.values())) * (
                            METHODS[method] is not nothing
                        )
                    seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            guesses = model(data["test"][:, pixels]).argmax(1)
        accuracies.append(float((guesses == data["test labels"]).double().mean()))
        judging += time.perf_counter() - start
    whole = time.perf_counter() - begun - judging
    left = sum(map(len, dormant(model, images[:1000]).values()))
    return {
        "last 5 tasks": mean(accuracies[-5:]),
        "all tasks": mean(accuracies),
        "dormant": left / 256,
        "recycled": recycled,
        "ms": 1000 * mean(seconds) if seconds else 0.0,
        "share of time": sum(seconds) / whole,
    }


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| method | accuracy, last 5 tasks | all tasks | dormant at the end | recycled | ms per call "
        "| share of the time |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, mine in runs.items():
        row = {k: mean(r[k] for r in mine) for k in mine[0]}
        spread = [r["last 5 tasks"] for r in mine]
        lines.append(
            f"| {method} | {row['last 5 tasks']:.2%} ({min(spread):.1%} to {max(spread):.1%}) "
            f"| {row['all tasks']:.2%} | "
            f"{row['dormant']:.1%} | {row['recycled']:.0f} | {row['ms']:.1f} | {row['share of time']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--write", action="store_true", help="write docs/recycling.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    raw = load_fashion_mnist()
    data = {
        "train": normalised(raw.train_images).flatten(1),
        "train labels": raw.train_labels,
        "test": normalised(raw.test_images).flatten(1),
        "test labels": raw.test_labels,
    }
    runs = {m: [life(m, s, data, options.tasks) for s in range(options.seeds)] for m in METHODS}
    print(table(runs))
    if options.write:
        PAGE.write_text(
            "# Recycling of dormant neurons\n\n"
            f"Written by `benchmarks/recycling.py --write` on {datetime.date.today()}: "
            f"torch {torch.__version__}, {os.cpu_count()} cores, one thread, {options.seeds} seeds (in brackets: the "
            f"least and the greatest).\n\nTwelve tasks in a row: Fashion-MNIST with the pixels permuted anew, 6,000 "
            f"samples each for two epochs; 784-128-128-10 with ReLU, Adam 5e-3, batch {BATCH}. A neuron is dormant "
            "where the mean of |h| is at most a tenth of its layer's, over 1,000 training images. Every 100 steps the "
            "dormant ones are recycled. Accuracy is that on the test set at the end of each task. In a run that "
            "changes itself, `Policy(recycle=True, dormant=0.1)` does the same at its looks; the measures are in "
            "[reports.md](reports.md#plasticity).\n\n" + table(runs) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

"""Accuracy right after removal, without any training, beside Torch-Pruning on the same networks in the same run.

    python benchmarks/one_shot.py                      # MLP and conv net, 3 seeds (needs torch-pruning: extra .[zoo])
    python benchmarks/one_shot.py --only mlp --seeds 1
    python benchmarks/one_shot.py --write              # and docs/one_shot.md

Each method removes the same share of every hidden layer. Calibration data are training images; no method sees the test
set. FLOPs and latency are of a batch of 256.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine
from tracker.surgery.compression import Limits, chosen_units, problems_of

PAGE = ROOT / "docs" / "one_shot.md"
Row = dict[str, Any]


def conv_net() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, 32), *block(32, 48), *block(48, 64),
        nn.Flatten(), nn.Linear(64 * 9, 10),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], int, tuple[float, ...]]] = {
    "mlp": (lambda: FashionMLP([512, 256]), 5, (0.5, 0.75, 0.9)),
    "conv": (conv_net, 3, (0.5, 0.75)),
}


def trained(name: str, seed: int, train: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    build, epochs, _ = NETS[name]
    set_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in tqdm(range(epochs), desc=f"Training {name}, seed {seed}", leave=False):
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def ours(model: nn.Module, share: float, batches: list[Tensor], compensate: bool) -> None:
    """Uniform shares, greedy OBS in each group."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=batches[0])
    engine.calibrate(batches)
    groups, problems, _ = problems_of(engine._tracker, Limits())
    units = {
        g.name: chosen_units(p, g, round(share * g.size))
        for g, p in zip(groups, problems, strict=True)
    }
    engine.prune_units(units, compensate=compensate)


def theirs(model: nn.Module, share: float, batches: list[Tensor], taylor: Tensor | None) -> None:
    """Torch-Pruning 1.6, uniform shares, as its README drives it."""
    import torch_pruning as tp

    importance = (
        tp.importance.GroupTaylorImportance()
        if taylor is not None
        else tp.importance.GroupMagnitudeImportance(p=2)
    )
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, batches[0], importance=importance, pruning_ratio=share, ignored_layers=[last]
    )
    if taylor is not None:
        for images, labels in zip(batches, taylor.split(len(batches[0])), strict=False):
            nn.functional.cross_entropy(model(images), labels).backward()
    pruner.step()
    model.zero_grad()


@torch.no_grad()
def reestimated(model: nn.Module, batches: list[Tensor]) -> None:
    """Running statistics of batch norms, anew from calibration data."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        for images in batches:
            model(images)
        model.eval()


def cost(model: nn.Module, sample: Tensor) -> tuple[int, int, float]:
    """Parameters, FLOPs, median seconds."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    times = []
    with torch.no_grad():
        for _ in range(15):
            start = time.perf_counter()
            model(sample)
            times.append(time.perf_counter() - start)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops(), sorted(times)[7]


def measure(name: str, seed: int, train: Any, test: Any) -> list[Row]:
    dense = trained(name, seed, train)
    pairs = [pair for pair, _ in zip(train, range(80), strict=False)]
    batches, labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
    sample = torch.cat([x for x, _ in pairs[:2]])
    methods: dict[str, Callable[[nn.Module, float], None]] = {
        "Torch-Pruning, magnitude": lambda m, s: theirs(m, s, batches, None),
        "Torch-Pruning, Taylor": lambda m, s: theirs(m, s, batches, labels),
        "tracker, OBS, no compensation": lambda m, s: ours(m, s, batches, False),
        "tracker, OBS, compensated": lambda m, s: ours(m, s, batches, True),
    }
    base = cost(dense, sample)
    rows: list[Row] = [
        {
            "net": name,
            "share": 0.0,
            "method": "dense",
            "accuracy": evaluate(dense, test)[1],
            "cost": base,
            "base": base,
        }
    ]
    for share in NETS[name][2]:
        for method, remove in methods.items():
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            remove(model, share)
            seconds = time.perf_counter() - start
            row = {"net": name, "share": share, "method": method, "seconds": seconds}
            row["accuracy"] = evaluate(model, test)[1]
            if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                reestimated(model, batches)
                row["reestimated"] = evaluate(model, test)[1]
            rows.append({**row, "cost": cost(model, sample), "base": base})
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| network | removed | method | accuracy | with BN re-estimated | parameters | FLOPs | latency | s to remove |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["net"], r["share"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["net"], r["share"], r["method"]) == key]
        ratios = [mean(r["cost"][i] / r["base"][i] for r in mine) for i in range(3)]
        again = f"{mean(r['reestimated'] for r in mine):.2%}" if "reestimated" in mine[0] else ""
        took = f"{mean(r['seconds'] for r in mine):.1f}" if "seconds" in mine[0] else ""
        lines.append(
            f"| {key[0]} | {key[1]:.0%} | {key[2]} | {mean(r['accuracy'] for r in mine):.2%} | {again} | "
            f"{ratios[0]:.1%} | {ratios[1]:.1%} | {ratios[2]:.0%} | {took} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="mlp,conv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--write", action="store_true", help="write docs/one_shot.md")
    options = parser.parse_args()
    train, test = get_data_loaders(batch_size=128, train_limit=options.samples)
    rows: list[Row] = []
    for name in options.only.split(","):
        for seed in range(options.seeds):
            rows += measure(name, seed, train, test)
            print(table(rows), "\n", flush=True)
    if options.write:
        import torch_pruning as tp

        PAGE.write_text(
            "# Removal without training\n\nMade by `benchmarks/one_shot.py` on "
            f"{datetime.date.today()}, torch {torch.__version__}, torch-pruning {tp.__version__}, "
            f"{os.cpu_count()} cores ({platform.machine()}), {options.seeds} seeds, Fashion-MNIST "
            f"({train.num_samples:,} training images). The same share of every hidden layer goes; calibration "
            "data are 10,240 training images; latency is of a batch of 256, relative to the dense network.\n\n"
            + table(rows)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

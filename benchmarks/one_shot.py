"""What is left right after removal, without any training, beside Torch-Pruning on the same networks in the same run.

    python benchmarks/one_shot.py                      # all three networks, 3 seeds (extra .[zoo] for Torch-Pruning)
    python benchmarks/one_shot.py --only mlp --quick
    python benchmarks/one_shot.py --only gpt --write   # and its section of docs/one_shot.md
    python benchmarks/one_shot.py --only smollm        # a pretrained language model (extra .[smollm]); half an hour

mlp: 784-512-256-10 on Fashion-MNIST, 5 epochs of Adam. conv: 32-48-64 with batch norms, 3 epochs. gpt: 4 blocks of
width 128 on the bytes of the standard library's source, 1,100 steps. Each method removes the same share of every layer
(of every block's neurons, or of its heads). Calibration data are of the training set; no method sees the test set.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos"), str(ROOT / "benchmarks")]

import _bytes
import _smollm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine
from tracker.surgery.prices.removal_problem import Limits, chosen_units, problems_of

PAGE = ROOT / "docs" / "one_shot.md"
CALIBRATION = 80  # batches
Row = dict[str, Any]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A trained network, what may be shown of the training set, and how it is judged."""

    dense: nn.Module
    pairs: Pairs
    loss: Loss
    score: Callable[[nn.Module], float]
    form: str  # of a score
    batch: Tensor  # to time
    example: Tensor  # to trace


@dataclass(frozen=True)
class Part:
    """What shrinks: layers that make the units, `heads` attention heads each (0: neurons or channels)."""

    title: str
    shares: tuple[float, ...]
    layers: Callable[[nn.Module], list[str]]
    heads: int = 0


def conv_net() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, 32), *block(32, 48), *block(48, 64),
        nn.Flatten(), nn.Linear(64 * 9, 10),
    )  # fmt: skip


def hidden(model: nn.Module) -> list[str]:
    """All layers with weights but the last."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]


def blocks(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda model: [n for n, _ in model.named_modules() if n.rpartition(".")[2] in names]


PARTS: dict[str, list[Part]] = {
    "mlp": [Part("hidden neurons", (0.5, 0.75, 0.9), hidden)],
    "conv": [Part("channels", (0.5, 0.75), hidden)],
    "gpt": [
        Part("MLP neurons", (0.5, 0.75), blocks("up")),
        Part("heads", (0.25, 0.5), blocks("q", "k", "v"), heads=4),
    ],
    "smollm": [Part("MLP neurons", (0.1, 0.25, 0.5), blocks("gate_proj", "up_proj"))],
}
TITLES = {
    "mlp": "MLP 784-512-256-10, Fashion-MNIST, accuracy",
    "conv": "Convolutions 32-48-64 with batch norms, Fashion-MNIST, accuracy",
    "gpt": "GPT of bytes, 4 blocks of width 128, the standard library's source, perplexity per byte",
    "smollm": "SmolLM2-135M-Instruct as published, the standard library's source, perplexity per token",
}


def image_case(name: str, seed: int, quick: bool) -> Case:
    train, test = get_data_loaders(128, 6_000 if quick else None, seed=seed)
    set_seed(seed)
    model = FashionMLP([512, 256]) if name == "mlp" else conv_net()
    optimizer = torch.optim.Adam(model.parameters())
    epochs = 1 if quick else 5 if name == "mlp" else 3
    for _ in tqdm(range(epochs), f"Training {name}, seed {seed}", leave=False, disable=None):
        for images, labels in train:
            optimizer.zero_grad()
            image_loss(model, images, labels).backward()
            optimizer.step()
    pairs = [pair for pair, _ in zip(train, range(CALIBRATION), strict=False)]
    return Case(
        model.eval(), pairs, image_loss, lambda m: evaluate(m, test)[1], "{:.2%}",
        torch.cat([x for x, _ in pairs[:2]]), pairs[0][0],
    )  # fmt: skip


def image_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def text_case(seed: int, quick: bool) -> Case:
    source = _bytes.Source()
    model = _bytes.trained(source, seed, 60 if quick else 1100)
    pairs = list(source.batches(1000 + seed, 10 if quick else CALIBRATION))
    return Case(
        model, pairs, _bytes.loss_of, lambda m: _bytes.perplexity(m, source), "{:.3f}",
        pairs[0][0], pairs[0][0],
    )  # fmt: skip


def smollm_case(seed: int, quick: bool) -> Case:
    model, tokenizer = _smollm.load()
    pairs = [(x, x) for x in _smollm.windows(tokenizer, 2 if quick else 16, seed)]
    held_out = _smollm.windows(tokenizer, 2 if quick else 8, 12345, test=True)
    return Case(
        model, pairs, _smollm.loss_of, lambda m: _smollm.perplexity(m, held_out), "{:.3f}",
        pairs[0][0], pairs[0][0][:, :16],
    )  # fmt: skip


def ours(
    model: nn.Module, case: Case, part: Part, share: float, compensate: bool, patches: bool = False
) -> None:
    """Uniform shares, greedy OBS in each group."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=case.example)
    engine.calibrate((x for x, _ in case.pairs), patches=patches)
    groups, problems, _ = problems_of(engine.tracker, Limits())
    wanted = set(part.layers(model))
    units = {
        g.name: chosen_units(problems, i, g, round(share * g.size))
        for i, g in enumerate(groups)
        if wanted & set(g.layers)
    }
    engine.prune_units(units, compensate=compensate)


def theirs(model: nn.Module, case: Case, part: Part, share: float, taylor: bool) -> None:
    """Torch-Pruning, uniform shares, as its README drives it."""
    import torch_pruning as tp

    wanted = [model.get_submodule(name) for name in part.layers(model)]
    makers = (nn.Linear, nn.Conv2d, nn.Embedding)
    pruner = tp.pruner.BasePruner(
        model,
        case.example,
        importance=tp.importance.GroupTaylorImportance()
        if taylor
        else tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,  # with 0 it takes no heads either
        ignored_layers=[m for m in model.modules() if isinstance(m, makers) and m not in wanted],
        num_heads=dict.fromkeys(wanted, part.heads) if part.heads else {},
        prune_num_heads=bool(part.heads),
        prune_head_dims=False,
        head_pruning_ratio=share if part.heads else 0.0,
    )
    for x, y in case.pairs if taylor else ():
        case.loss(model, x, y).backward()
    pruner.step()
    model.zero_grad()


PATCHES = "tracker, OBS, compensated, patches"  # of convolutions
METHODS: dict[str, Callable[[nn.Module, Case, Part, float], None]] = {
    "Torch-Pruning, magnitude": lambda m, c, p, s: theirs(m, c, p, s, taylor=False),
    "Torch-Pruning, Taylor": lambda m, c, p, s: theirs(m, c, p, s, taylor=True),
    "tracker, OBS, no compensation": lambda m, c, p, s: ours(m, c, p, s, compensate=False),
    "tracker, OBS, compensated": lambda m, c, p, s: ours(m, c, p, s, compensate=True),
    PATCHES: lambda m, c, p, s: ours(m, c, p, s, compensate=True, patches=True),
}


@torch.no_grad()
def reestimated(model: nn.Module, case: Case) -> nn.Module:
    """A copy with the running statistics of its batch norms taken anew from calibration data."""
    model = copy.deepcopy(model)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for x, _ in case.pairs:
        model(x)
    return model.eval()


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@torch.no_grad()
def latency(model: nn.Module, dense: nn.Module, x: Tensor, rounds: int = 31) -> float:
    """Median of the ratios of neighbouring calls: a drift of the machine's speed hits both. Half a minute at most."""
    ratios: list[float] = []
    begun = time.perf_counter()
    while len(ratios) < rounds and (len(ratios) < 3 or time.perf_counter() < begun + 30):
        seconds = []
        for one in (model, dense):
            start = time.perf_counter()
            one(x)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(name: str, seed: int, quick: bool) -> list[Row]:
    cases = {"gpt": text_case, "smollm": smollm_case}
    case = cases[name](seed, quick) if name in cases else image_case(name, seed, quick)
    score = case.score(case.dense)
    normed = any(isinstance(m, nn.BatchNorm2d) for m in case.dense.modules())
    methods = [m for m in METHODS if m != PATCHES or name == "conv"]
    todo = [(p, s, m) for p in PARTS[name] for s in p.shares for m in methods]
    rows: list[Row] = []
    for part, share, method in tqdm(todo, f"{name}, seed {seed}", leave=False, disable=None):
        model = copy.deepcopy(case.dense)
        start = time.perf_counter()
        METHODS[method](model, case, part, share)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "key": (f"{share:.0%} of {part.title}", method),
                "dense": score,
                "score": case.score(model),
                "again": case.score(reestimated(model, case)) if normed else None,
                "parameters": size(model) / size(case.dense),
                "flops": flops(model, case.batch) / flops(case.dense, case.batch),
                "latency": latency(model, case.dense, case.batch),
                "seconds": seconds,
                "form": case.form,
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    normed = rows[0]["again"] is not None
    head = ["removed", "method", "dense", "after removal", *["BN re-estimated"] * normed]
    head += ["parameters", "FLOPs", "latency", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys(r["key"] for r in rows):
        mine = [r for r in rows if r["key"] == key]

        def of(field: str, form: str, mine: list[Row] = mine) -> str:
            return form.format(mean(r[field] for r in mine))

        form = mine[0]["form"]
        cells = [*key, *(of(f, form) for f in ("dense", "score", *["again"] * normed))]
        cells += [of("parameters", "{:.1%}"), of("flops", "{:.1%}"), of("latency", "{:.0%}")]
        lines.append(f"| {' | '.join([*cells, of('seconds', '{:.1f}')])} |")
    return "\n".join(lines)


INTRODUCTION = """# Removal without training

Written by `benchmarks/one_shot.py --write`. The same share of every layer goes, and nothing is trained afterwards.
Calibration data are of the training set: 80 batches, of SmolLM2 16 windows of 512 tokens. No method sees the test set.
"No compensation" and "compensated" remove the same units. Parameters, FLOPs and latency are relative to the dense
network; latency is measured, one thread, pruned and dense in turn. Seconds are those of the whole removal: tracing,
calibration, selection, change. "Patches": each place of a convolution's kernel takes over by itself.
"""


def write(name: str, content: str, seeds: int) -> None:
    """Put the section of one network into the page; the others stay."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torch-pruning"))
    section = (
        f"## {TITLES[name]}\n\n{datetime.date.today()}: {versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()}), mean of {seeds} seed{'s' * (seeds > 1)}.\n\n{content}\n"
    )
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    parts = {s.partition("\n")[0]: s for s in re.findall(r"^## [^\0]*?(?=^## |\Z)", old, re.M)}
    parts[f"## {TITLES[name]}"] = section
    found = [parts[f"## {t}"].strip() for t in TITLES.values() if f"## {t}" in parts]
    PAGE.write_text("\n\n".join([INTRODUCTION.strip(), *found]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="mlp,conv,gpt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, little training: a smoke test"
    )
    parser.add_argument("--write", action="store_true", help="write sections of docs/one_shot.md")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick is no measurement to write down")
    torch.set_num_threads(1)
    for name in options.only.split(","):
        rows: list[Row] = []
        seeds = 1 if options.quick or name == "smollm" else options.seeds
        for seed in range(seeds):
            rows += measure(name, seed, options.quick)
        print(f"{TITLES[name]}\n\n{table(rows)}\n", flush=True)
        if options.write:
            write(name, table(rows), seeds)


if __name__ == "__main__":
    main()

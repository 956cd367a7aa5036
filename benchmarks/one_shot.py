"""What is left right after removal, without any training, beside Torch-Pruning on the same networks in the same run.

    python benchmarks/one_shot.py                      # all three networks, 3 seeds (extra .[zoo] for Torch-Pruning)
    python benchmarks/one_shot.py --only mlp --quick
    python benchmarks/one_shot.py --only gpt --write   # and its section of docs/one_shot.md
    python benchmarks/one_shot.py --only smollm        # a pretrained language model (extra .[smollm]); half an hour
    python benchmarks/one_shot.py --only smollm-all --resume --write  # the same, to a budget of all parameters, beside
                                                       # FLAP, ShortGPT and SliceGPT; what was not measured yet
    python benchmarks/one_shot.py --only resnet20,vit --seeds 1 --write  # to half of the FLOPs; what was not measured

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
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos"), str(ROOT / "benchmarks")]

import _one_shot_budget
import _one_shot_flops
import torch
from _one_shot_cases import PARTS, TITLES, Case, image_case, smollm_case, text_case
from _one_shot_methods import METHODS, PATCHES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

PAGE = ROOT / "docs" / "one_shot.md"
RESULTS = ROOT / "benchmarks" / "results"  # rows that take minutes each
FILE = RESULTS / "one_shot.jsonl"  # of smollm-all
Row = dict[str, Any]


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

Written by `benchmarks/one_shot.py --write`. Nothing is trained afterwards. The same share of every layer goes; where a
whole network is to meet a budget, the section says so.
Calibration data are of the training set: 80 batches, of SmolLM2 16 windows of 512 tokens. No method sees the test set.
"No compensation" and "compensated" remove the same units. Parameters, FLOPs and latency are relative to the dense
network; latency is measured, one thread, pruned and dense in turn. Seconds are those of the whole removal: tracing,
calibration, selection, change. "Patches": each place of a convolution's kernel takes over by itself.
"""


def write(name: str, content: str, seeds: int) -> None:
    """Put the section of one network into the page; the others stay.

    seeds: Of which all numbers are means; 0: the section itself says of how many.
    """
    means = f", mean of {seeds} seed{'s' * (seeds > 1)}" if seeds else ""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torch-pruning"))
    section = (
        f"## {TITLES[name]}\n\n{datetime.date.today()}: {versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()}){means}.\n\n{content}\n"
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
    parser.add_argument("--methods", default="", help="of smollm-all: those whose names begin so")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=(), help="of smollm-all: only these"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of smollm-all")
    parser.add_argument("--report", action="store_true", help="only those, and measure no more")
    parser.add_argument("--write", action="store_true", help="write sections of docs/one_shot.md")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick is no measurement to write down")
    torch.set_num_threads(1)
    for name in options.only.split(","):
        one_seed = options.quick or name == "smollm"
        seeds = 1 if one_seed else options.seeds
        if name == "smollm-all":
            file = None if options.quick else FILE
            known = options.report and _one_shot_budget.known(FILE)
            rows = known or _one_shot_budget.measure(
                options.quick, file, options.resume, seeds, options.methods, options.shares
            )
            seeds, content = 0, _one_shot_budget.section(rows)
        elif name in _one_shot_flops.NETWORKS:
            file = RESULTS / "one_shot_flops.jsonl"
            if not options.report:
                _one_shot_flops.measure(name, seeds, file, reestimated)
            known = [r for r in _one_shot_flops.known(file) if r["network"] == name]
            seeds, content = 1 + max(r["seed"] for r in known), _one_shot_flops.section(name, known)
        else:
            content = table(
                [r for seed in range(seeds) for r in measure(name, seed, options.quick)]
            )
        print(f"{TITLES[name]}\n\n{content}\n", flush=True)
        if options.write:
            write(name, content, seeds)


if __name__ == "__main__":
    main()

"""How often a verdict on a change is wrong: changes that do nothing, and changes that raise the loss by a tenth.

    python benchmarks/verdicts.py               # 200 of each; a minute or two
    python benchmarks/verdicts.py --seed 7 --write       # and its part of docs/self_modification.md

A 784-128-64-10 network on Fashion-MNIST, batches of 64, changed every 80 steps, judged after 50. *Nothing*: one more
neuron that nobody reads, while it trains with AdamW. *A switch*: the same, and the pixels are permuted anew ten steps
later. *Harm*: neurons go in random order, uncompensated, until the loss on 2,000 images has risen by 10% or more; it
trains with so small a rate (SGD, 1e-5) that it cannot make up for them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch
from _common import section
from torch import nn
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, get_data_loaders
from tracker import NeuronEngine, Policy, Requests

PAGE = ROOT / "docs" / "self_modification.md"
EVERY, SETTLE, BATCH = 80, 50, 64
RISE = 0.1


def nothing(candidates: Any, *args: Any) -> Requests:
    return Requests("one neuron more", expand={candidates[0].name: 1})


def harm(candidates: Any, *args: Any) -> Requests:
    return Requests("to be replaced", remove={candidates[0].name: (0,)})


def trial(kind: str, number: int, seed: int) -> tuple[int, int]:
    """Changes, and how many of them were undone."""
    torch.manual_seed(seed)
    data, test = get_data_loaders(BATCH, train_limit=12_000, test_limit=2_000, seed=seed)
    model, criterion = FashionMLP([128, 64]), nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(4 if kind == "harm" else 0):
        for x, y in data:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    if kind == "harm":
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=test.images[:16])
    engine.attach_optimizer(optimizer)
    rule = harm if kind == "harm" else nothing
    engine.start_self_modification(
        Policy.of(
            rule, warm_up=EVERY, every=EVERY, look=8, settle=SETTLE, patience=0, gradients=True
        )
    )
    run: Any = engine.trainer.run
    order = torch.Generator().manual_seed(seed + 1)

    def value(net: nn.Module) -> float:
        with torch.no_grad():
            return float(criterion(net(test.images), test.labels))

    def cut(wanted: Requests, policy: Policy) -> Any:
        """As many units of the first layer, in random order, as the loss asks for."""
        bench, before = copy.deepcopy(model), value(model)
        units: list[int] = []
        for unit in torch.randperm(model.fc1.out_features, generator=order).tolist():
            units.append(unit)
            with torch.no_grad():
                bench.fc2.weight[:, unit] = 0
            if value(bench) >= (1 + RISE) * before:
                break
        return engine.prune_units({next(iter(wanted.remove)): units}, compensate=False)

    if kind == "harm":
        run._do = cut
    changes = undone = since = 0
    pixels = torch.arange(784)
    bar = tqdm(total=number, desc=kind, leave=False, disable=None)
    while changes < number or since <= SETTLE:
        for x, y in data:
            if kind == "a switch" and since == 10:
                pixels = torch.randperm(784)
            loss = criterion(model(x.flatten(1)[:, pixels]), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            engine.step(loss)
            since += 1
            last = engine.life[-1]
            if last.step == run.steps and last.what == "undone":
                undone += 1
            elif last.step == run.steps and last.what in ("expanded", "pruned"):
                changes, since = changes + 1, 0
                bar.update()
            if kind == "harm" and since == SETTLE + 1 and last.what == "pruned":
                engine.undo()  # it was missed: the next trial begins with all units
            if changes == number and since > SETTLE:
                break
    return changes, undone


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    lines = ["| change | trials | undone |", "|---|---|---|"]
    for kind in ("nothing", "a switch", "harm"):
        changes, undone = trial(kind, options.trials, options.seed)
        lines.append(f"| {kind} | {changes} | {undone} ({undone / changes:.1%}) |")
        tqdm.write(lines[-1])
    if options.write:
        made = f"{datetime.date.today()}, torch {torch.__version__}, seed {options.seed}"
        told = f"{made}. `benchmarks/verdicts.py`."
        section(PAGE, "Verdicts", f"{told}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

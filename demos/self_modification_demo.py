"""The main job: a network that changes itself while it learns, beside a fixed one, on the same data.

    python demos/self_modification_demo.py            # starts wide (784-512-256-10) and shrinks
    python demos/self_modification_demo.py --grow     # starts narrow (784-16-10) and grows
    python demos/self_modification_demo.py --seeds 3 --write    # and its table in docs/self_modification.md

The policy is to have made its changes within the first third of the run; what is left then learns in peace. Beside it,
for the same FLOPs, the fixed network and the control that a sceptic asks for: the network that came of it, trained from
the start; the learning rate of each falls by a cosine over what it may spend. Prints what was decided, and accuracy,
parameters and training FLOPs of all. Leaves the picture of the network's life, an HTML page and a checkpoint in
outputs/.
"""

import argparse
import datetime
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from _common import CHECKPOINTS, REPORTS, ROOT, VISUALIZATIONS, quick, section, table_by_seed, wrote
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine, Policy

EPOCHS = 8  # of the network that changes itself, or as many as come to
STEPS = quick(8000) // 8  # steps: the embedded sample is small
LEAST = 24  # steps, within which changes fit
POINTS = 16  # at which accuracy is measured


@dataclass(frozen=True)
class Plan:
    """start, fixed: hidden layers. settings: of the policy."""

    title: str
    start: list[int]
    fixed: list[int]
    settings: dict[str, Any]


SHRINK = Plan(
    "Shrinking, from 784-512-256-10", [512, 256], [512, 256], {"max_parameters": 80_000, "floor": 8}
)
GROW = Plan(
    "Growing, from 784-16-10",
    [16],
    [256],
    {"shrink": False, "grow": True, "max_parameters": 150_000},
)


@dataclass
class Result:
    """What came of one training."""

    name: str
    seed: int
    accuracy: float
    parameters: int
    flops: float
    steps: int


def step_flops(model: nn.Module, images: torch.Tensor) -> int:
    """Of one training step: the backward pass costs twice the forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return 3 * counter.get_total_flops()


def train(
    name: str,
    hidden: list[int],
    seed: int,
    data,
    test,
    *,
    policy: Policy | None = None,
    steps: int | None = None,
    budget: float = math.inf,
):
    """Train for so many steps, or until `budget` FLOPs are spent; return model, engine and what came of it."""
    set_seed(seed)
    model = FashionMLP(hidden)
    optimizer = torch.optim.Adam(model.parameters())
    spent, done, each, share = 0.0, 0, 0, 0.0
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: (1 + math.cos(math.pi * min(share, 1.0))) / 2
    )
    engine = NeuronEngine()
    engine.track_model(model, "FashionMLP", example_inputs=next(iter(test))[0][:16])
    engine.attach_optimizer(optimizer)
    if policy is not None:
        engine.start_self_modification(policy)
    criterion, losses, point = nn.CrossEntropyLoss(), [], 0
    batches = (batch for _ in iter(int, 1) for batch in data)
    with tqdm(total=100, desc=f"{name}, seed {seed}", unit="%", leave=False, disable=None) as bar:
        while share < 1:
            model.train()
            images, labels = next(batches)
            each = each or step_flops(model, images)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spent, done = spent + each, done + 1
            share = spent / budget if steps is None else done / steps
            rate.step()
            losses.append(loss.detach())
            if policy is not None and engine.step(loss) is not None:
                each = 0
            bar.update(min(100, int(100 * share)) - bar.n)
            if share < (point + 1) / POINTS:
                continue
            point += 1
            engine.start_tracking()
            accuracy = evaluate(model, test)[1]
            engine.log_epoch_statistics(point, float(torch.stack(losses).mean()), accuracy)
            engine.stop_tracking()
            losses = []
    parameters = sum(p.numel() for p in model.parameters())
    return model, engine, Result(name, seed, accuracy, parameters, spent, done)


def table(results: list[Result]) -> str:
    """As Markdown, parameters relative to the largest."""
    most = max(r.parameters for r in results)
    return table_by_seed(
        ("network", "seed", "test accuracy", "parameters", "training FLOPs", "steps"),
        results,
        lambda r: (r.accuracy, r.parameters, r.flops, r.steps),
        lambda accuracy, parameters, flops, steps: (
            f"{accuracy:.2%}",
            f"{parameters:,.0f} ({parameters / most:.1%})",
            f"{flops:.3g}",
            f"{steps:,.0f}",
        ),
    )


def show(model: nn.Module, engine: NeuronEngine) -> None:
    """What was decided and why, what became of the network, and the files that are left."""
    for d in engine.life:
        if d.what != "kept":
            print(f"step {d.step:>5}  {d.what:<8} {d.why}; {d.parameters:,} parameters")
    print(model)
    picture = VISUALIZATIONS / "network_life.png"
    engine.plot_life(picture)
    page = engine.save_html_report(REPORTS / "network_life.html")
    checkpoint = engine.save_checkpoint(CHECKPOINTS / "self_modified")
    wrote(picture, page, checkpoint)
    print(f"python -m tracker show {os.path.relpath(checkpoint)}: what is in the checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grow", action="store_true", help="start narrow")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    plan = GROW if options.grow else SHRINK
    data, test = get_data_loaders(
        batch_size=128, train_limit=quick(60_000), test_limit=quick(10_000)
    )
    print(
        f"{plan.title}. Data: {data.source}; {data.num_samples:,} to train, {test.num_samples:,} to test"
    )
    steps = max(EPOCHS * len(data), STEPS)
    policy, results = Policy.over(max(steps // 3, LEAST), **plan.settings), []
    fixed = "-".join(map(str, [784, *plan.fixed, 10]))
    for seed in range(options.seeds):
        model, engine, mine = train(
            "self-modified", plan.start, seed, data, test, policy=policy, steps=steps
        )
        results.append(mine)
        widths = list(engine.get_summary()["layers"].values())[:-1]
        control = "its final architecture from the start"
        for name, hidden in ((control, widths), (f"fixed {fixed}", plan.fixed)):
            *_, result = train(name, hidden, seed, data, test, budget=mine.flops)
            results.append(result)
        if seed == 0:
            show(model, engine)
    print(f"\n{table(results)}")
    if options.write:
        measured = f"{datetime.date.today()}, torch {torch.__version__}, {options.seeds} seeds."
        section(
            ROOT / "docs" / "self_modification.md", plan.title, f"{measured}\n\n{table(results)}"
        )


if __name__ == "__main__":
    main()

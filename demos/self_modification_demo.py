"""The main job: a network that changes itself while it learns, beside a fixed one, on the same data.

    python demos/self_modification_demo.py            # starts wide (784-512-256-10) and shrinks
    python demos/self_modification_demo.py --grow     # starts narrow (784-16-10) and grows
    python demos/self_modification_demo.py --seeds 3 --write    # and its table in docs/self_modification.md

Training is paid in FLOPs, and the learning rate falls with what was spent: where a network is small, its steps are
cheap. Prints what was decided, and accuracy, parameters and training FLOPs of both, and of the control: the network
that came of it, trained from the start for the same FLOPs. Leaves the picture of the network's life, an HTML page and a
checkpoint in outputs/.
"""

import argparse
import datetime
import math
import os
from dataclasses import dataclass, replace

import torch
from _common import CHECKPOINTS, REPORTS, ROOT, VISUALIZATIONS, quick, section, table_by_seed, wrote
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine, Policy
from tracker.training.schedule import LEAST, schedule

EPOCHS = 5  # of the fixed network, or as many as come to
STEPS = quick(8000) // 8  # steps: the embedded sample is small
USUAL = 1500  # steps for which the plans' schedules were made; shorter runs get one in proportion


@dataclass(frozen=True)
class Plan:
    """start, fixed: hidden layers. share: of the fixed network's training FLOPs."""

    title: str
    start: list[int]
    fixed: list[int]
    share: float
    policy: Policy


SHRINK = Plan(
    "Shrinking, from 784-512-256-10",
    [512, 256],
    [512, 256],
    0.58,
    Policy(warm_up=200, every=100, look=40, tolerance=4e-3, at_most=0.7, floor=8, max_parameters=80_000,
           min_parameters=76_000),
)  # fmt: skip
GROW = Plan(
    "Growing, from 784-16-10",
    [16],
    [256],
    1.0,
    Policy(warm_up=100, every=100, shrink=False, grow=True, plateau=1.0, max_parameters=150_000),
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
    name: str, hidden: list[int], policy: Policy | None, budget: float, seed: int, data, test
):
    """Train until `budget` FLOPs are spent, with or without a policy; return model, engine and what came of it."""
    set_seed(seed)
    model = FashionMLP(hidden)
    optimizer = torch.optim.Adam(model.parameters())
    spent, steps, each = 0.0, 0, 0
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: (1 + math.cos(math.pi * min(spent / budget, 1.0))) / 2
    )
    engine = NeuronEngine()
    engine.track_model(model, "FashionMLP", example_inputs=next(iter(test))[0][:16])
    engine.attach_optimizer(optimizer)
    if policy is not None:
        engine.start_self_modification(policy)
    criterion, epoch = nn.CrossEntropyLoss(), 0
    with tqdm(total=100, desc=f"{name}, seed {seed}", unit="%", leave=False, disable=None) as bar:
        while spent < budget:
            model.train()
            losses = []
            for images, labels in data:
                each = each or step_flops(model, images)
                loss = criterion(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                spent, steps = spent + each, steps + 1
                rate.step()
                losses.append(loss.detach())
                if policy is not None and engine.step(loss) is not None:
                    each = 0
                if spent >= budget:
                    break
            bar.update(min(100, int(100 * spent / budget)) - bar.n)
            epoch += 1
            engine.start_tracking()
            accuracy = evaluate(model, test)[1]
            engine.log_epoch_statistics(epoch, float(torch.stack(losses).mean()), accuracy)
            engine.stop_tracking()
    parameters = sum(p.numel() for p in model.parameters())
    return model, engine, Result(name, seed, accuracy, parameters, spent, steps)


def table(results: list[Result]) -> str:
    """As Markdown, relative to the largest."""
    full = max(r.flops for r in results)
    most = max(r.parameters for r in results)
    return table_by_seed(
        ("network", "seed", "test accuracy", "parameters", "training FLOPs", "steps"),
        results,
        lambda r: (r.accuracy, r.parameters, r.flops, r.steps),
        lambda accuracy, parameters, flops, steps: (
            f"{accuracy:.2%}",
            f"{parameters:,.0f} ({parameters / most:.1%})",
            f"{flops:.3g} ({flops / full:.0%})",
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
    set_seed(0)
    steps = max(EPOCHS * len(data), STEPS)
    images = next(iter(data))[0]
    budget = steps * step_flops(FashionMLP(plan.fixed), images)
    paid = plan.share * budget
    policy, own = plan.policy, int(paid / step_flops(FashionMLP(plan.start), images))
    if plan.start == plan.fixed and LEAST <= own < USUAL:
        policy = replace(policy, **schedule(own))
    results = []
    for seed in range(options.seeds):
        fixed = "-".join(map(str, [784, *plan.fixed, 10]))
        *_, result = train(f"fixed {fixed}", plan.fixed, None, budget, seed, data, test)
        results.append(result)
        model, engine, result = train("self-modified", plan.start, policy, paid, seed, data, test)
        results.append(result)
        widths = list(engine.get_summary()["layers"].values())[:-1]
        *_, result = train("its final architecture", widths, None, paid, seed, data, test)
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

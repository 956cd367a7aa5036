"""What a self-modification that watches costs: training with a policy beside the same training without one.

    python benchmarks/look_cost.py                      # minutes on one core
    python benchmarks/look_cost.py --only MLP --pairs 5
    python benchmarks/look_cost.py --write              # and its part of docs/self_modification.md

The policy has its defaults, with growth and recycling on and no room to grow: it observes, prices what it could do,
and decides, at every 200th and at every 100th step; what it decides on is refused at the last moment, so that both
trainings keep the same network. They take the same batches in one process, a stretch from one look to the next in turn;
CPU seconds of one thread. At the end it may change the network once: what that takes, with its trace, trial and
verification, is told beside.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch
from _bytes import GPT, Source
from _common import section
from torch import Tensor, nn
from tqdm import tqdm

from fashion_mnist_mlp import FashionMLP, get_data_loaders
from tracker import NeuronEngine, Policy, SurgeryError

PAGE = ROOT / "docs" / "self_modification.md"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network and its batches, without end. stretches: by default."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    stretches: int


def images() -> Iterator[Batch]:
    data, _ = get_data_loaders(batch_size=128, train_limit=20_000)
    while True:
        yield from data


def pictures() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(16, 3, 64, 64, generator=generator)
        yield x, torch.randint(10, (16,), generator=generator)


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


TASKS = (
    Task("MLP 784-512-256-10, batch 128", lambda: FashionMLP([512, 256]), images, 6),
    Task("ResNet-18, 64 px, batch 16", resnet, pictures, 1),
    Task("byte GPT, 875,520 parameters, 16 x 128", GPT, lambda: Source().batches(0, 10**9), 2),
)


@dataclass
class Side:
    """One training. policy: None for the bare one."""

    task: Task
    policy: Policy | None
    seconds: float = 0.0  # of the last stretch
    last: float = 0.0  # of the call of `step` at its end

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.task.build()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.batches = self.task.batches()
        self.engine = NeuronEngine()
        x, _ = next(self.batches)
        self.engine.track_model(self.model, "m", example_inputs=x[:4])
        self.engine.attach_optimizer(self.optimizer)
        if self.policy is not None:
            most = sum(p.numel() for p in self.model.parameters())
            settings = self.policy.to_dict() | {"max_parameters": most}
            _ = self.engine.structure  # traced once, before the first look
            self.engine.start_self_modification(Policy.from_dict(settings))
            self.run: Any = self.engine.trainer.run
            self.run._do = self._refuse

    def _refuse(self, *args: object) -> Any:
        raise SurgeryError("not now")

    def go(self, steps: int) -> float:
        """CPU seconds of so many steps."""
        start = time.process_time()
        for number in range(steps):
            x, y = next(self.batches)
            out = self.model(x)
            loss = nn.functional.cross_entropy(out.flatten(0, -2), y.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            before = time.process_time()
            if self.policy is not None:
                self.engine.step(loss)
            if number == steps - 1:
                self.last = time.process_time() - before  # where a look ends
        return time.process_time() - start


def measure(task: Task, policy: Policy, pairs: int) -> dict[str, Any]:
    """Medians over stretches from one look to the next."""
    bare, watched = Side(task, None), Side(task, policy)
    bare.go(policy.every)
    watched.go(policy.every)  # what is compiled and cached at first is not the look's
    ratios, seconds, looks = [], [], []
    for number in tqdm(
        range(pairs), f"{task.name}, every {policy.every}", leave=False, disable=None
    ):
        sides = (bare, watched) if number % 2 == 0 else (watched, bare)
        for side in sides:
            side.seconds = side.go(policy.every)
        ratios.append(watched.seconds / bare.seconds)
        seconds.append(bare.seconds / policy.every)
        looks.append(watched.last)
    del watched.run._do
    watched.go(policy.every)
    decided = watched.engine.life[-1]
    return {
        "name": task.name,
        "every": policy.every,
        "step": 1e3 * statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "looks": len(looks),
        "look": 1e3 * statistics.median(looks),
        "change": f"{decided.what}, {1e3 * watched.last:.0f}",
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| training | a look every | step, ms | with the policy | looks | one decision, ms | with a change, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['every']} | {r['step']:.1f} | {r['ratio']:.3f} x | {r['looks']} | {r['look']:.0f} | "
        f"{r['change']} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="tasks whose names hold this")
    parser.add_argument("--every", default="200,100", help="steps from one look to the next")
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task in TASKS:
        if options.only not in task.name:
            continue
        for every in map(int, options.every.split(",")):
            policy = Policy(
                grow=True,
                recycle=True,
                warm_up=0,
                every=every,
                settle=min(50, every // 2),
                patience=0,
            )
            rows.append(measure(task, policy, options.pairs or task.stretches))
            tqdm.write(table(rows[-1:]).splitlines()[-1])
    print(table(rows))
    if options.write:
        told = f"{datetime.date.today()}, torch {torch.__version__}, one thread. `benchmarks/look_cost.py`."
        section(PAGE, "What watching costs", f"{told}\n\n{table(rows)}")


if __name__ == "__main__":
    main()

"""One training of `controls.py` and `levers.py`: what it may spend, what it gives, and the file that keeps it."""

from __future__ import annotations

import copy
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch
from _control_tasks import TASKS_BY_NAME, Task, data_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tracker import NeuronEngine

POINTS = 12  # of each curve
SELF, FINAL, TIMED, START, ONCE, SWEEP = (
    "self-modified",
    "its final architecture, same FLOPs",
    "its final architecture, same seconds",
    "the starting architecture, same FLOPs",
    "trained wide, compressed once, trained on",
    "best of the sweep",
)


@dataclass
class Result:
    """What came of one training.

    Attributes:
        task, run, seed, steps_asked: Which one it is. steps_asked: of the network that changes itself.
        rate: Peak of the learning rate.
        value: On test data. chosen_by: On data that were held back.
        flops, seconds: Spent on training, looks and changes; of CPU time.
        curve: (FLOPs, seconds, value).
        changes: "pruned", "expanded", ... by step.
        made: The day.
    """

    task: str
    run: str
    seed: int
    steps_asked: int
    rate: float
    value: float
    chosen_by: float
    parameters: int
    flops: float
    seconds: float
    steps: int
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    changes: list[tuple[int, str, int]] = field(default_factory=list)
    made: str = field(default_factory=lambda: str(datetime.date.today()))

    @property
    def key(self) -> tuple[str, str, int, int, float]:
        """What tells it from others."""
        return self.task, self.run, self.seed, self.steps_asked, self.rate


@dataclass
class Limit:
    """What a run may spend; one of them."""

    steps: float = math.inf
    flops: float = math.inf
    seconds: float = math.inf

    def share(self, steps: int, flops: float, seconds: float) -> float:
        """Of it that is spent."""
        return max(steps / self.steps, flops / self.flops, seconds / self.seconds)


def step_flops(model: nn.Module, batch: Any) -> int:
    """Of one training step: the backward pass costs twice the forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch[0])
    return 3 * counter.get_total_flops()


def loss_by(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def anew(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with the weights that a training begins with.

    Raises:
        TypeError: A module has parameters and no way to begin anew.
    """
    torch.manual_seed(seed)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise TypeError(f"A {type(module).__name__} cannot begin anew.")
        if type(model).__name__ == "GPT" and isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return fresh


def train(
    task: Task,
    run: str,
    model: nn.Module,
    limit: Limit,
    seed: int,
    rate: float,
    asked: int,
    modifies: bool = False,
) -> tuple[nn.Module, Result]:
    """Train until the limit is spent."""
    data = data_of(task)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        rate,
        betas=(0.9, 0.95 if task.decay else 0.999),
        weight_decay=task.decay,
    )
    batches: Iterator[Any] = data.batches(seed, asked)
    spent, seconds, steps, each = 0.0, 0.0, 0, 0
    engine = NeuronEngine()
    once = run == ONCE
    if modifies or once:
        first = next(data.batches(seed, asked))
        engine.track_model(model, "m", example_inputs=first[0][:4])
        engine.attach_optimizer(optimizer)
    if modifies:
        engine.start_self_modification(task.policy(asked))
    curve: list[tuple[float, float, float]] = []
    with tqdm(total=100, desc=f"{run}, seed {seed}", unit="%", leave=False, disable=None) as bar:
        while (share := limit.share(steps, spent, seconds)) < 1:
            model.train()
            begun = time.process_time()
            if once and share >= 0.5:
                seen, once = [next(batches) for _ in range(16)], False
                keep = task.keep / sum(p.numel() for p in model.parameters())
                engine.calibrate(seen, loss=loss_by, inputs=lambda b: b[0])
                engine.compress(keep=keep, of="parameters")
                spent, each = spent + len(seen) * each, 0
            batch = next(batches)
            each = each or step_flops(model, batch)
            for group in optimizer.param_groups:
                warm = min(1.0, share / 0.1) if task.decay else 1.0
                group["lr"] = (
                    rate * warm * ((1 + math.cos(math.pi * share)) / 2 if task.anneals else 1.0)
                )
            loss = loss_by(model(batch[0]), batch)
            optimizer.zero_grad()
            loss.backward()
            if task.decay:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            spent, steps = spent + each, steps + 1
            if modifies and engine.step(loss.detach()) is not None:
                each = 0
            seconds += time.process_time() - begun
            now = limit.share(steps, spent, seconds)
            if now >= (len(curve) + 1) / POINTS:
                model.eval()
                curve.append((spent, seconds, data.value(model, "test")))
            bar.update(min(100, int(100 * now)) - bar.n)
    model.eval()
    return model, Result(
        *(task_name(task), run, seed, asked, rate),
        statistics.mean(v for *_, v in curve[-task.tail :]),
        data.value(model, "validation"),
        sum(p.numel() for p in model.parameters()),
        spent,
        seconds,
        steps,
        curve,
        [(d.step, d.what, d.parameters) for d in engine.life if d.what != "kept"],
    )


def task_name(task: Task) -> str:
    return next(name for name, other in TASKS_BY_NAME.items() if other.title == task.title)


class Log:
    """Results in a file, one a line."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.results = [Result(**json.loads(line)) for line in lines]

    def find(self, *key: Any) -> Result | None:
        return next((r for r in self.results if r.key == key), None)

    def add(self, result: Result) -> Result:
        self.results.append(result)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        tqdm.write(
            f"{result.task}, {result.run}, seed {result.seed}: {result.value:.4f}, {result.flops:.3g} FLOPs, "
            f"{result.seconds:.0f} s"
        )
        return result

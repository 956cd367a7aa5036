"""What makes a network that changes itself better or worse than its final architecture: one setting at a time.

    python benchmarks/levers.py --tasks mlp-shrink --seeds 2 --resume   # rows in benchmarks/results/levers.jsonl
    python benchmarks/controls.py --report --write                      # docs/controls.md, with these rows

A lever is a task of `controls.py` with one thing otherwise. Its control is the final architecture that came of it, from
the start, for the same FLOPs and with the same learning rate. Levers are chosen by data that are held back.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch
from _control_runs import FINAL, SELF, Limit, Log, Result, anew, task_name, train
from _control_tasks import EARLY, GPT_GROWTH, TASKS_BY_NAME, Task, data_of, growth, shrinking

from tracker import Policy
from tracker.surgery.optimizer_state import slot_age

FILE = ROOT / "benchmarks" / "results" / "levers.jsonl"
AS_IT_IS = "the task as it is"


@dataclass(frozen=True)
class Lever:
    """What is otherwise. policy, rate, head_start: None: as it is. head_start: steps, see `slot_age`; 0: none."""

    policy: Callable[[int], Policy] | None = None
    rate: float | None = None
    head_start: int | None = None


LEVERS: dict[str, dict[str, Lever]] = {
    "mlp-shrink": {
        "changes over the whole run": Lever(shrinking(80_000)),
        "changes within half of it": Lever(shrinking(80_000, 0.5)),
        "changes within a quarter of it": Lever(shrinking(80_000, 0.25)),
        "changes within a twentieth": Lever(shrinking(80_000, EARLY / 2)),
        "most at the first looks: `ramp=8`, `at_most=0.9`": Lever(
            shrinking(80_000, EARLY, ramp=8.0, at_most=0.9)
        ),
        "4 looks, not 12": Lever(shrinking(80_000, EARLY, every=65)),
        "learning rate 3e-3": Lever(rate=3e-3),
    },
    "mlp-grow": {
        "changes over the whole run": Lever(growth(150_000)),
        "changes within half of it": Lever(growth(150_000, 0.5)),
        "changes within a quarter of it": Lever(growth(150_000, 0.25)),
        "changes within a twentieth": Lever(growth(150_000, EARLY / 2)),
        "4 looks, not 12": Lever(growth(150_000, EARLY, every=65)),
        "new units in random directions": Lever(growth(150_000, EARLY, gradients=False)),
        "new units with second moments of their own": Lever(head_start=0),
        "learning rate 3e-3": Lever(rate=3e-3),
        "learning rate 3e-3, new units with second moments of their own": Lever(
            rate=3e-3, head_start=0
        ),
    },
    "gpt-6e12": {
        "changes over the whole run": Lever(growth(875_520, **GPT_GROWTH)),
        "changes within a tenth of it": Lever(growth(875_520, EARLY, **GPT_GROWTH)),
        "new units by gradients": Lever(growth(875_520, 0.5, insert=2)),
        "learning rate 1.5e-3": Lever(rate=1.5e-3),
    },
}


def measure(task: Task, lever: str, seed: int, log: Log) -> None:
    """The network that changes itself and its control, if they are not there yet."""
    how, name, asked = LEVERS[task_name(task)][lever], task_name(task), task.steps
    task, rate = replace(task, policy=how.policy or task.policy), how.rate or task.rates[0]
    runs = [f"{lever}: {run}" for run in (SELF, FINAL)]
    if all(log.find(name, run, seed, asked, rate) for run in runs):
        return
    torch.manual_seed(seed)
    head_start = slot_age.HEAD_START if how.head_start is None else how.head_start
    with patch.object(slot_age, "HEAD_START", head_start):
        model, mine = train(
            task, runs[0], task.start(), Limit(steps=asked), seed, rate, asked, modifies=True
        )
    limit = Limit(flops=mine.flops)
    _, control = train(task, runs[1], anew(model, seed), limit, seed, rate, asked)
    log.results = [r for r in log.results if r.key not in (mine.key, control.key)]
    log.add(mine)
    log.add(control)


def section(task: Task, own: Sequence[Result], log: Log) -> str:
    """The table of a task's levers; nothing where none was measured.

    own: The results of the task as it is.
    """
    name = task_name(task)
    percent = data_of(task).greater_is_better
    rows = [_row(AS_IT_IS, own, SELF, FINAL, percent=percent)]
    for lever in LEVERS.get(name, {}):
        mine = [r for r in log.results if r.task == name and r.run.startswith(f"{lever}: ")]
        names = f"{lever}: {SELF}", f"{lever}: {FINAL}"
        rows.append(_row(lever, mine, *names, percent=percent))
    told = [row for row in rows if row]
    if len(told) < 2:
        return ""
    held = "accuracy" if percent else "loss"
    head = (
        f"| what is otherwise | seeds | {held} on held-back data | its control | difference | difference on test data "
        "| training FLOPs |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([_chance(own, percent=percent), "", head, *told])


def _chance(own: Sequence[Result], *, percent: bool) -> str:
    """How far single seeds lie apart."""
    pairs = [(a, b) for a in own for b in own if a.run == SELF and b.run == FINAL]
    found = [a.value - b.value for a, b in pairs if a.seed == b.seed]
    if len(found) < 2:
        return "Levers:"
    spread = statistics.stdev(found)
    told = f"{100 * spread:.2f} points" if percent else f"{spread:.3f}"
    return (
        f"Levers. From seed to seed the difference on test data has a standard deviation of {told}: that of one seed "
        "tells little."
    )


def _row(title: str, results: Sequence[Result], run: str, control: str, *, percent: bool) -> str:
    own = {r.seed: r for r in results if r.run == run}
    others = {r.seed: r for r in results if r.run == control and r.seed in own}
    pairs = [(own[seed], other) for seed, other in sorted(others.items())]
    if not pairs:
        return ""

    def mean(of: Callable[[Result, Result], float]) -> float:
        return statistics.mean(of(a, b) for a, b in pairs)

    scale, digits = (100, 2) if percent else (1, 3)
    values = (lambda a, b: a.chosen_by), (lambda a, b: b.chosen_by)
    gains = (lambda a, b: a.chosen_by - b.chosen_by), (lambda a, b: a.value - b.value)
    cells = [f"{scale * mean(of):.{digits}f}" for of in values]
    cells += [f"{scale * mean(of):+.{digits}f}" for of in gains]
    cells.append(f"{mean(lambda a, b: a.flops):.3g}")
    return f"| {title} | {len(pairs)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", default=",".join(LEVERS), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    options = parser.parse_args()
    names = options.tasks.split(",")
    unknown = [n for n in names if n not in LEVERS]
    if unknown:
        parser.error(f"there are no levers of {unknown[0]!r}: {', '.join(LEVERS)}")
    torch.set_num_threads(1)
    log = Log(FILE, options.resume)
    for seed in range(options.seeds):
        for name in names:
            for lever in LEVERS[name]:
                measure(TASKS_BY_NAME[name], lever, seed, log)
    print("Rows for docs/controls.md: python benchmarks/controls.py --report --write")


if __name__ == "__main__":
    main()

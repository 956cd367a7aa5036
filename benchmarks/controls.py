"""A network that changes itself, beside those that a referee asks for; mean and 95% interval over seeds.

    python benchmarks/controls.py --tasks mlp-shrink,mlp-grow --seeds 3   # all tasks, 5 seeds: days on one core
    python benchmarks/controls.py --resume                # what is missing in benchmarks/results/controls.jsonl
    python benchmarks/controls.py --report --write    # docs/controls.md, and its part of docs/self_modification.md

The network that changes itself takes a given number of steps; what they cost, in FLOPs and in CPU seconds (looks and
changes included), is what the others may spend: *its final architecture* from the start, with the same FLOPs and once
more with the same seconds; the *starting architecture*; where it shrinks, the wide one *compressed once* when half of
the FLOPs are spent; and the *best of a sweep* of five fixed widths, for each of which three learning rates were tried
with a seed of its own. What is chosen is chosen on data that are held back; the value is that on test data. The
learning rate falls by a cosine over what each run may spend. *Levers* are the task with one
thing otherwise, each beside a control of its own: the final architecture that came of it (`benchmarks/levers.py`).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import levers
import torch
from _common import OUTPUTS, section
from _control_runs import (
    FINAL,
    ONCE,
    SELF,
    START,
    SWEEP,
    TIMED,
    Limit,
    Log,
    Result,
    anew,
    task_name,
    train,
)
from _control_tasks import TASKS_BY_NAME, Task, data_of
from torch import nn

PAGE, PICTURES = ROOT / "docs" / "controls.md", ROOT / "docs" / "images"
LEADING = ROOT / "docs" / "self_modification.md"
FILE = ROOT / "benchmarks" / "results" / "controls.jsonl"
TUNING = 1000  # the seed by which learning rates are tuned
# Two-sided 95% quantiles of Student's t, by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Part(IntEnum):
    """Of the runs of a seed, in the order in which they are made for all seeds: a table that is stopped tells most."""

    MAIN = 0  # the network that changes itself, and its final architecture with the same FLOPs
    REST = 1
    SWEEP = 2


def measure(task: Task, seed: int, log: Log, asked: int, part: Part) -> None:
    """The runs of one part and one seed that are not there yet."""
    name, rate = task_name(task), task.rates[0]
    built = OUTPUTS / f"controls_{name}_{asked}_{seed}.pt"

    def once(
        run: str, make: Callable[[], nn.Module], limit: Limit, at: float = rate, number: int = seed
    ) -> Result:
        known = log.find(name, run, number, asked, at)
        if known is None:
            torch.manual_seed(number)
            known = log.add(train(task, run, make(), limit, number, at, asked)[1])
        return known

    def modified() -> Result:
        torch.manual_seed(seed)
        model, result = train(
            task, SELF, task.start(), Limit(steps=asked), seed, rate, asked, modifies=True
        )
        torch.save(anew(model, seed), built)
        return result

    mine = log.find(name, SELF, seed, asked, rate) or log.add(modified())
    flops = Limit(flops=mine.flops)

    def final() -> nn.Module:
        if not built.exists():  # the row is of another machine
            modified()
        found: nn.Module = torch.load(built, weights_only=False)  # written above
        return anew(found, seed)

    rebuilt = any(what != "recycled" for _, what, _ in mine.changes)
    if part is Part.MAIN and rebuilt:
        once(FINAL, final, flops)
    if part is Part.REST:
        once(START, task.start, flops)
        if task.keep:
            once(ONCE, task.start, flops)
        if rebuilt:
            once(TIMED, final, Limit(seconds=mine.seconds))
    if part is not Part.SWEEP:
        return
    tuned: dict[str, float] = {}
    others = [r for r in log.results if r.task == name and r.run == SELF and r.steps_asked == asked]
    price = min(others, key=lambda r: r.seed)
    for width, make in task.sweep.items():
        tried = [
            once(f"{width}, tuned", make, Limit(flops=price.flops), r, TUNING) for r in task.rates
        ]
        sign = 1 if data_of(task).greater_is_better else -1
        tuned[width] = max(tried, key=lambda r: sign * r.chosen_by).rate
    for width, make in task.sweep.items():
        once(width, make, flops, tuned[width])


def interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean, by Student's t."""
    if len(values) < 2:
        return math.nan
    t = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _told(values: Sequence[float], percent: bool) -> str:
    scale, digits = (100.0, 2) if percent else (1.0, 4)
    mean, half = scale * statistics.mean(values), scale * interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")


def rows_of(task: Task, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by row of the table; of the sweep the width that does best on data that were held back."""
    found = {run: [r for r in results if r.run == run] for run in (SELF, FINAL, TIMED, START, ONCE)}
    fixed = {w: [r for r in results if r.run == w] for w in task.sweep}
    fixed = {w: mine for w, mine in fixed.items() if mine}
    if fixed:
        sign = 1 if data_of(task).greater_is_better else -1
        best = max(fixed, key=lambda w: sign * statistics.mean(r.chosen_by for r in fixed[w]))
        found[f"{SWEEP}: {best}, learning rate {fixed[best][0].rate:g}"] = fixed[best]
    return {run: mine for run, mine in found.items() if mine}


def table(task: Task, results: Sequence[Result]) -> str:
    """As Markdown, and what follows from it."""
    data, rows = data_of(task), rows_of(task, results)
    percent = data.greater_is_better
    unit = ", %" if percent else ""
    lines = [
        f"| run | seeds | {data.name}{unit} | self-modified, minus this | parameters | training FLOPs | CPU seconds "
        "| steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own = {r.seed: r.value for r in rows[SELF]}
    for run, mine in rows.items():
        pairs = [own[r.seed] - r.value for r in mine if r.seed in own]
        means = [
            statistics.mean(getattr(r, n) for r in mine)
            for n in ("parameters", "flops", "seconds", "steps")
        ]
        against = _told(pairs, percent) if run != SELF and pairs else ""
        lines.append(
            f"| {run} | {len(mine)} | {_told([r.value for r in mine], percent)} | {against} | {means[0]:,.0f} | "
            f"{means[1]:.3g} | {means[2]:,.0f} | {means[3]:,.0f} |"
        )
    swept = [r.flops for r in results if r.run.removesuffix(", tuned") in task.sweep]
    if swept:
        tuning = sum(r.flops for r in results if r.run.endswith(", tuned"))
        once = tuning + (sum(swept) - tuning) / len(rows[SELF])
        share = statistics.mean(r.flops for r in rows[SELF]) / once
        lines.append(
            f"\nOne self-modified run spends {share:.1%} of the FLOPs of the sweep that finds that network "
            f"({len(task.sweep)} widths, {len(task.rates)} learning rates each, and one run more of each width)."
        )
    return "\n".join(lines)


def _changing(results: Sequence[Result]) -> str:
    """When the networks that change themselves did so."""
    runs = [r for r in results if r.run == SELF and r.changes]
    if not runs:
        return "Nothing was changed."
    first, last = (statistics.mean(r.changes[at][0] for r in runs) for at in (0, -1))
    count = statistics.mean(len(r.changes) for r in runs)
    return (
        f"{count:.1f} changes in the mean, the first after {first:,.0f} steps and the last after {last:,.0f}, of "
        f"{statistics.mean(r.steps for r in runs):,.0f}."
    )


def picture(task: Task, results: Sequence[Result], path: Path) -> None:
    """Values over FLOPs and over CPU seconds: the mean of all seeds, and from the least to the greatest."""
    import matplotlib.pyplot as plt

    data, rows = data_of(task), rows_of(task, results)
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    lows = []
    for number, (run, mine) in enumerate(rows.items()):
        for column, ax in enumerate(axes):
            points = list(
                zip(*(r.curve[: min(len(m.curve) for m in mine)] for r in mine), strict=True)
            )
            x = [statistics.mean(p[column] for p in point) for point in points]
            y = [[p[2] for p in point] for point in points]
            ax.plot(x, [statistics.mean(v) for v in y], color=f"C{number}", label=run, marker=".")
            ax.fill_between(
                x,
                [min(v) for v in y],
                [max(v) for v in y],
                color=f"C{number}",
                alpha=0.15,
                linewidth=0,
            )
        lows += [statistics.mean(v) for v in y[1:]]
    axes[0].set_ylabel(data.name)
    axes[0].set_xlabel("training FLOPs")
    axes[1].set_xlabel("CPU seconds of training, looks and changes included")
    margin = 0.05 * (max(lows) - min(lows)) + 1e-3
    axes[0].set_ylim(min(lows) - margin, max(lows) + margin)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="lower right" if data.greater_is_better else "upper right")
    fig.suptitle(task.title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _days(results: Sequence[Result]) -> str:
    """The first and the last of them."""
    return " to ".join(sorted({f(r.made for r in results) for f in (min, max)})) if results else ""


def page(log: Log) -> str:
    """All that was measured, task by task."""
    parts = [
        "# Controls",
        "Is a network that changes itself better than one that knew its final architecture from the start? Written by "
        f"`benchmarks/controls.py` from what was measured on {_days(log.results)}: torch {torch.__version__}, one "
        "thread; ± is half of the 95% interval of the mean (Student's t), differences are of the same seeds. The "
        "rows are in `benchmarks/results/`.",
        (__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[2].strip(),
    ]
    told = set[str]()
    for name, task in TASKS_BY_NAME.items():
        for asked in sorted({r.steps_asked for r in log.results if r.task == name}):
            results = [r for r in log.results if r.task == name and r.steps_asked == asked]
            if not any(r.run == SELF for r in results):
                continue
            told.add(name)
            short = (
                "" if asked == task.steps else f", shortened to {asked:,} of {task.steps:,} steps"
            )
            image = PICTURES / f"controls_{name}_{asked}.png"
            picture(task, results, image)
            parts += [
                f"## {task.title}{short}",
                f"Data: {data_of(task).source}.",
                table(task, results),
                _changing(results),
                f"![Value over FLOPs and over seconds]({image.relative_to(PAGE.parent)})",
            ]
            tried = levers.section(task, results, Log(levers.FILE, resume=True))
            if tried and asked == task.steps:
                parts.append(tried)
    missing = [n for n in TASKS_BY_NAME if n not in told]
    if missing:
        parts += ["## Not measured yet", ", ".join(f"`{n}`" for n in missing) + "."]
    return "\n\n".join(parts) + "\n"


def _pairs(
    task: Task, results: Sequence[Result], run: str, control: str
) -> list[tuple[Result, Result]]:
    """Of a task that is not shortened: both runs of each seed that has both."""
    mine = [r for r in results if r.task == task_name(task) and r.steps_asked == task.steps]
    return [
        (a, b) for a in mine for b in mine if a.run == run and b.run == control and a.seed == b.seed
    ]


def _compared(task: Task, how: str, pairs: Sequence[tuple[Result, Result]]) -> str:
    """A row of the summary."""
    data = data_of(task)
    percent, unit = data.greater_is_better, ", %" if data.greater_is_better else ""
    values = [a.value for a, _ in pairs], [b.value for _, b in pairs]
    cells = [_told(v, percent) for v in (*values, [a.value - b.value for a, b in pairs])]
    last = statistics.mean(a.changes[-1][0] / a.steps for a, _ in pairs)
    return (
        f"| {task.title}{how} | {len(pairs)} | {data.name}{unit} | {' | '.join(cells)} "
        f"| after {last:.0%} of the steps |"
    )


def _behind(task: Task, log: Log) -> list[tuple[Result, Result]]:
    """Runs beside their starting architecture, where that is the better one in the mean."""
    pairs = _pairs(task, log.results, SELF, START)
    sign = 1 if data_of(task).greater_is_better else -1
    return pairs if sum(sign * (b.value - a.value) for a, b in pairs) > 0 else []


def _told_start(task: Task, pairs: Sequence[tuple[Result, Result]]) -> str:
    data = data_of(task)
    values = [
        _told([r.value for r in runs], data.greater_is_better) for runs in zip(*pairs, strict=True)
    ]
    return f"{task.title}: {values[1]} against {values[0]} ({len(pairs)} seeds)"


SUMMARY = """What the final architecture gives that is trained from the start, for the same FLOPs: the means of seeds,
with half of the 95% interval. More controls, and what was tried: [controls.md](controls.md). Changes belong early in a
run where a network is no larger than what it may spend allows: a large network pays for many steps of a small one, and
what is new must learn while the learning rate is high. One that is too large for it, as the language model here, does
better to grow late, or not at all."""


def summary(log: Log) -> str:
    """For the page of self-modification: each task beside its final architecture."""
    lines = [
        "| task | seeds | value | self-modified | its final architecture, same FLOPs | difference | last change |",
        "|---|---|---|---|---|---|---|",
    ]
    tried = Log(levers.FILE, resume=True).results
    for name, task in TASKS_BY_NAME.items():
        levered = levers.LEVERS.get(name, {}).items()
        rates = [n for n, how in levered if how.rate and how.head_start is None]
        for lever in ("", *rates):
            runs = [f"{lever}: {run}" if lever else run for run in (SELF, FINAL)]
            pairs = _pairs(task, tried if lever else log.results, *runs)
            if pairs:
                lines.append(_compared(task, f", {lever} for both" if lever else "", pairs))
    small = [_told_start(t, pairs) for t in TASKS_BY_NAME.values() if (pairs := _behind(t, log))]
    if small:
        told = "; ".join(small)
        lines += ["", f"The starting architecture, for the same FLOPs, is better still: {told}."]
    made = f"{_days(log.results)}, torch {torch.__version__}. `benchmarks/controls.py`."
    return "\n\n".join([SUMMARY, made, "\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tasks", default=",".join(TASKS_BY_NAME), help="names, separated by commas"
    )
    parser.add_argument("--seeds", type=int, default=5, help="at 6e13 FLOPs 2")
    parser.add_argument("--steps", type=float, default=1.0, help="share of each task's steps")
    parser.add_argument("--sweep", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--write", action="store_true", help="write the pages")
    options = parser.parse_args()
    names = options.tasks.split(",")
    unknown = [n for n in names if n not in TASKS_BY_NAME]
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}: {', '.join(TASKS_BY_NAME)}")
    torch.set_num_threads(1)
    log = Log(FILE, options.resume or options.report)
    parts = [] if options.report else [p for p in Part if options.sweep or p is not Part.SWEEP]
    for part in parts:
        for seed in range(options.seeds):
            for name in names:
                task = TASKS_BY_NAME[name]
                if name != "gpt-6e13" or seed < 2:
                    measure(task, seed, log, max(int(task.steps * options.steps), 60), part)
    found = page(log)
    print(found)
    if options.write:
        PAGE.write_text(found)
        section(LEADING, "Controls", summary(log))


if __name__ == "__main__":
    main()

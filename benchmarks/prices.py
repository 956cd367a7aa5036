"""Predicted against measured rise of the loss, for every group that can shrink, at five depths of cut.

    python benchmarks/prices.py                    # mlp, conv, gpt
    python benchmarks/prices.py --only mlp --quick
    python benchmarks/prices.py --only gpt --write  # and its section of docs/prices.md
    python benchmarks/prices.py --only smollm      # extra .[smollm]; every fifth layer

Networks and calibration data as in one_shot.py. One group is cut at a time, the others taking over, and given back.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demos"), str(ROOT / "benchmarks")]

import torch
from _one_shot_cases import TITLES, Case, image_case, smollm_case, text_case
from tqdm import tqdm

from tracker import NeuronEngine
from tracker.surgery.prices.removal_problem import Limits, problems_of

PAGE = ROOT / "docs" / "prices.md"
DEPTHS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of a group's units
Row = dict[str, Any]


def case_of(name: str, quick: bool) -> Case:
    if name == "gpt":
        return text_case(0, quick)
    return smollm_case(0, quick) if name == "smollm" else image_case(name, 0, quick)


def measure(name: str, quick: bool) -> tuple[list[Row], float, tuple[float, float]]:
    """Rows, the loss of the dense network, and seconds of a calibration with prices and of one without gradients."""
    case = case_of(name, quick)
    model, held_out = case.dense, len(case.pairs) // 3
    fitted, asked = case.pairs[held_out:], case.pairs[:held_out]

    class Output(torch.nn.Module):  # `case.loss` calls the model by itself
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.value

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return case.loss(Output(output), *batch)

    @torch.no_grad()
    def measured() -> float:
        return float(torch.stack([case.loss(model, x, y) for x, y in asked]).mean())

    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs=case.example)
    groups = [g for g in engine.structure.groups if g.prunable and g.exact]
    start = time.perf_counter()
    engine.calibrate(fitted, loss=loss)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    from tracker.surgery.calibration.consumers import collect, consumers

    collect(model, (x for x, _ in fitted), consumers(model, groups)[0])
    plain = time.perf_counter() - start
    groups, problems, _ = problems_of(engine.tracker, Limits())
    dense, rows = measured(), []
    chosen = range(0, len(groups), 5 if name == "smollm" else 1)
    for i in tqdm(chosen, f"{name}: groups", leave=False, disable=None):
        group, problem = groups[i], problems[i]
        selection = problem.backward()
        for count in sorted({min(max(round(d * group.size), 1), group.size - 1) for d in DEPTHS}):
            gone = sorted(selection.order[:count])
            receipt = engine.prune_units({group.name: gone}, compensate=True, verify=False)
            rows.append(
                {
                    "group": group.name, "gone": count, "of": group.size,
                    "predicted": receipt.predicted_loss_change, "measured": measured() - dense,
                }
            )  # fmt: skip
            engine.undo()
    return rows, dense, (seconds, plain)


def ranks(values: Sequence[float]) -> torch.Tensor:
    order = torch.tensor(values, dtype=torch.float64).argsort()
    found = torch.empty(len(values), dtype=torch.float64)
    found[order] = torch.arange(len(values), dtype=torch.float64)
    return found


def summary(rows: list[Row], dense: float) -> tuple[float, float, int]:
    """Spearman's correlation; median factor between the two up to a rise of 10%, and of how many cuts."""
    pairs = [(r["predicted"], r["measured"]) for r in rows]
    both = torch.stack([ranks([p for p, _ in pairs]), ranks([m for _, m in pairs])])
    small = [(p, m) for p, m in pairs if 0.001 * dense < m <= 0.1 * dense]
    factors = [max(p / m, m / p) if p > 0 else float("inf") for p, m in small]
    return float(torch.corrcoef(both)[0, 1]), median(factors or [float("nan")]), len(factors)


def section(rows: list[Row], dense: float, seconds: tuple[float, float]) -> str:
    spearman, factor, count = summary(rows, dense)
    lines = [
        f"Loss of the dense network {dense:.4f} nats. Spearman's correlation over {len(rows)} cuts {spearman:.3f}; "
        f"median factor between predicted and measured, over the {count} cuts that raise the loss by 0.1% to 10%, "
        f"{factor:.2f}. Calibration {seconds[0]:.1f} s, without gradients {seconds[1]:.1f} s.",
        "",
        "| group | units gone | predicted | measured | measured, relative |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        share = r["measured"] / dense
        cells = [r["group"], f"{r['gone']} of {r['of']}", f"{r['predicted']:+.5f}"]
        lines.append(f"| {' | '.join(cells)} | {r['measured']:+.5f} | {share:+.2%} |")
    return "\n".join(lines)


INTRODUCTION = """# Prices of removals, and what they turn out to be

Written by `benchmarks/prices.py --write`. Of each group, one at a time, so many units go in the order in which the
library takes them, and the consumers take over. Predicted: `predicted_loss_change` of the receipt, from calibration
data of the training set. Measured: the rise of the mean loss on other batches of the training set, in nats.
"""


def write(name: str, content: str) -> None:
    title = TITLES[name].rpartition(",")[0]
    head = f"{datetime.date.today()}: torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    text = f"## {title}\n\n{head}, {os.cpu_count()} cores ({platform.machine()}), seed 0.\n\n{content}\n"
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    parts = {p.partition("\n")[0]: p for p in re.split(r"^(?=## )", old, flags=re.MULTILINE)[1:]}
    parts[f"## {title}"] = text
    known = [f"## {TITLES[n].rpartition(',')[0]}" for n in TITLES]
    body = "\n".join(parts[k].rstrip() + "\n" for k in known if k in parts)
    PAGE.write_text(f"{INTRODUCTION}\n{body}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="mlp,conv,gpt", help="names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small data, short training")
    parser.add_argument("--write", action="store_true", help="write docs/prices.md")
    options = parser.parse_args()
    for name in options.only.split(","):
        content = section(*measure(name, options.quick))
        print(f"{TITLES[name]}\n\n{content}\n", flush=True)
        if options.write:
            write(name, content)


if __name__ == "__main__":
    main()

"""The last section of one_shot.py: SmolLM2 to a share of all its parameters, by each method as it spends a budget."""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _one_shot_cases import PARTS, Case, smollm_case
from _one_shot_methods import ours, theirs
from _peer_flap import flap
from _peer_llama import parameters
from _peer_shortgpt import shortgpt
from _peer_slicegpt import slicegpt
from torch import Tensor, nn
from tqdm import tqdm

from tracker import NeuronEngine

# Share of the parameters that is asked for, and what the perplexity may then be, relative to the dense network.
GOALS = {0.9: 1.10, 0.8: 1.30, 0.7: 1.75}
OURS = "tracker, `compress`"
Row = dict[str, Any]
Extra = dict[str, Any]  # what a method tells beside its network


def next_token_loss(output: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats; ids: (samples, positions)."""
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tokens(case: Case) -> list[Tensor]:
    return [x for x, _ in case.pairs]


def compress(model: nn.Module, case: Case, keep: float) -> Extra:
    """Ours as a user calls it, with the defaults of every argument."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=case.example)
    receipt = engine.compress(
        keep, of="parameters", batches=tokens(case), loss=next_token_loss, progress=False
    )
    return {
        "notes": list(receipt.notes),
        "candidates": dict(receipt.candidates),
        "before": receipt.loss_before,
        "after": receipt.loss_after,
    }


def evenly(
    method: Callable[[nn.Module, Case, Any, float], None],
) -> Callable[[nn.Module, Case, float], Extra]:
    """The same share of every MLP, so that the whole network meets the budget."""
    part = PARTS["smollm"][0]

    def call(model: nn.Module, case: Case, keep: float) -> Extra:
        mlps = sum(parameters(m) for n, m in model.named_modules() if n.endswith(".mlp"))
        method(model, case, part, (1 - keep) * parameters(model) / mlps)
        return {}

    return call


def peer(method: Callable[..., None], **options: bool) -> Callable[[nn.Module, Case, float], Extra]:
    def call(model: nn.Module, case: Case, keep: float) -> Extra:
        method(model, tokens(case), keep, **options)
        return {}

    return call


METHODS: dict[str, Callable[[nn.Module, Case, float], Extra]] = {
    OURS: compress,
    "tracker, even shares of MLPs": evenly(lambda m, c, p, s: ours(m, c, p, s, compensate=True)),
    "Torch-Pruning, magnitude": evenly(lambda m, c, p, s: theirs(m, c, p, s, taylor=False)),
    "Torch-Pruning, Taylor": evenly(lambda m, c, p, s: theirs(m, c, p, s, taylor=True)),
    "FLAP": peer(flap),
    "FLAP, MLPs only": peer(flap, attention=False),
    "ShortGPT": peer(shortgpt),
    "SliceGPT": peer(slicegpt),
    "SliceGPT, one table of embeddings": peer(slicegpt, shared=True),
}


def known(file: Path) -> list[Row]:
    """Rows of earlier runs."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def seed_of(row: Row) -> int:
    """Which calibration windows; rows of before there were several have the first."""
    return int(row.get("seed", 0))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Of each share, method and seed the last row."""
    by_key = {(r["keep"], r["method"], seed_of(r)): r for r in rows}
    seeds = sorted({seed_of(r) for r in by_key.values()})
    keys = [(k, m, s) for k in GOALS for m in METHODS for s in seeds]
    return [by_key[key] for key in keys if key in by_key]


def measure(
    quick: bool,
    file: Path | None,
    resume: bool,
    seeds: int = 1,
    methods: str = "",
    shares: Iterable[float] = (),
) -> list[Row]:
    """A row for each share, method and draw of calibration windows.

    Args:
        quick: Few windows, one share: a smoke test.
        file: Where rows are kept, one a line, each as soon as it is there; None: nowhere.
        resume: Leave out what the file has already, rather than begin it again.
        seeds: How many draws of calibration windows; the windows of the test stay.
        methods: Only those whose names begin so.
        shares: Only these; none: all.
    """
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.unlink(missing_ok=True)
    rows = [] if file is None else known(file)
    done = {(r["keep"], r["method"], seed_of(r)) for r in rows}
    shares = list(GOALS)[-1:] if quick else list(shares) or list(GOALS)
    every = [
        (s, k, m) for s in range(seeds) for k in shares for m in METHODS if m.startswith(methods)
    ]
    todo = [(s, k, m) for s, k, m in every if (k, m, s) not in done]
    cases: dict[int, tuple[Case, float]] = {}
    for seed, keep, method in tqdm(todo, "smollm-all", leave=False, disable=None):
        if seed not in cases:
            case = smollm_case(seed, quick)
            cases = {seed: (case, case.score(case.dense))}
        rows.append({"seed": seed, **row(*cases[seed], keep, method)})
        if file is not None:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    return in_order(rows)


def row(case: Case, dense: float, keep: float, method: str) -> Row:
    torch.manual_seed(0)
    model = copy.deepcopy(case.dense)
    start = time.perf_counter()
    extra = METHODS[method](model, case, keep)
    return {
        "keep": keep,
        "method": method,
        "dense": dense,
        "seconds": time.perf_counter() - start,
        "perplexity": case.score(model),
        "parameters": parameters(model) / parameters(case.dense),
        "block": parameters(case.dense.model.layers[0]) / parameters(case.dense),
        "date": str(datetime.date.today()),
        **extra,
    }


EXPLANATION = """The share asked is of all parameters that are stored: embeddings, new biases and rotations count.
Calibration data are 16 windows of 512 tokens of the training files; perplexity is that of 8 windows of other
files, dense {dense:.3f}. Where several draws of calibration windows were measured, "each" has one ratio for each, and
the other columns are means. One method ran after the other; all leave real, narrower weights, none is a mask. Seconds
are those of the whole removal, on a processor that other work shared.

- `compress`: `engine.compress(keep, of="parameters", batches=windows, loss=loss)`, all other arguments at their
  defaults.
- Even shares: the same share of every MLP, chosen and compensated as in the section before.
- Torch-Pruning: the same share of every MLP.
- FLAP ([2312.11983](https://arxiv.org/abs/2312.11983)), ShortGPT ([2403.03853](https://arxiv.org/abs/2403.03853))
  and SliceGPT ([2401.15024](https://arxiv.org/abs/2401.15024)): written from the papers, `benchmarks/_peer_*.py`.
  FLAP's units are neurons and key-value groups, or neurons only. Whole blocks come in steps of {block:.1%} of the
  parameters; ShortGPT removes them until the budget is met. SliceGPT must store embeddings and head apart, which
  this model shares; "one table of embeddings" is a variant kinder to it that keeps them shared and puts a matrix
  between."""


def by_method(rows: list[Row], keep: float) -> dict[str, list[Row]]:
    """Rows of a share, one for each draw of calibration windows."""
    mine = [r for r in rows if r["keep"] == keep]
    return {
        m: [r for r in mine if r["method"] == m] for m in dict.fromkeys(r["method"] for r in mine)
    }


def ratios(rows: list[Row]) -> list[float]:
    return [r["perplexity"] / r["dense"] for r in rows]


def table(rows: list[Row]) -> str:
    """Means over draws of calibration windows, and each draw's own ratio."""
    head = [
        "parameters asked",
        "method",
        "parameters kept",
        "perplexity",
        "× dense",
        "each",
        "seconds",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for keep in GOALS:
        for method, mine in by_method(rows, keep).items():
            cells = [
                f"{keep:.0%}",
                method,
                f"{fmean(r['parameters'] for r in mine):.1%}",
                f"{fmean(r['perplexity'] for r in mine):.3f}",
                f"{fmean(ratios(mine)):.3f}",
                ", ".join(f"{ratio:.3f}" for ratio in ratios(mine)) if len(mine) > 1 else "",
                f"{fmean(r['seconds'] for r in mine):.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> str:
    """Goals, and who is first, over the draws that `compress` and the other both have."""
    head = ["parameters asked", "goal, × dense", "`compress`", "", "first", "× dense", "of methods"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for keep, goal in GOALS.items():
        found = {m: {seed_of(r): r for r in mine} for m, mine in by_method(rows, keep).items()}
        if OURS not in found:
            continue
        mean = {m: fmean(ratios(list(mine.values()))) for m, mine in found.items()}
        ahead = {OURS: 0.0}  # by how much a method is ahead of ours, draw by draw
        for method, mine in found.items():
            both = sorted(mine.keys() & found[OURS].keys())
            if both:
                ahead[method] = fmean(
                    ratios([found[OURS][s]])[0] - ratios([mine[s]])[0] for s in both
                )
        first = max(ahead, key=lambda m: ahead[m])
        cells = [f"{keep:.0%}", f"{goal:.2f}", f"{mean[OURS]:.3f}"]
        cells += ["met" if mean[OURS] <= goal else "missed", first]
        cells += [f"{mean[OURS] - ahead[first]:.3f}", f"{len(found)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tried(rows: list[Row]) -> str:
    """The losses on held-back windows between which `compress` chose."""
    mine = [r for r in rows if r.get("candidates")]
    names = list(dict.fromkeys(n for r in mine for n in r["candidates"]))
    head = f"| parameters asked | draw | dense | {' | '.join(names)} |"
    lines = [head, "|---" * (len(names) + 3) + "|"]
    for r in mine:
        best = min(r["candidates"].values())
        cells = []
        for name in names:
            loss = r["candidates"].get(name)
            text = "" if loss is None else f"{loss:.4f}"
            cells.append(f"**{text}**" if loss == best else text)
        lines.append(
            f"| {r['keep']:.0%} | {seed_of(r)} | {r['before']:.4f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def section(rows: list[Row]) -> str:
    """The text of the page: of each share and method the last row."""
    rows = in_order(rows)
    dense = rows[0]["dense"]
    text = EXPLANATION.format(dense=dense, block=rows[0]["block"])
    parts = [text, table(rows), "Goals, and the first of each share:", verdicts(rows)]
    if any(r.get("candidates") for r in rows):
        told = "What `compress` tried on copies, the loss on the windows that it held back; it took the best:"
        parts += [told, tried(rows)]
    there = {(r["keep"], r["method"]) for r in rows}
    missing = {m: [f"{k:.0%}" for k in GOALS if (k, m) not in there] for m in METHODS}
    if any(missing.values()):
        told = [f"{m} at {', '.join(shares)}" for m, shares in missing.items() if shares]
        parts.append(f"Not measured yet: {'; '.join(told)}.")
    return "\n\n".join(parts)

"""What the coverage benchmark found, as text: a summary for the terminal, a page for the manual."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from _families import FAMILIES

Result = dict[str, Any]
STATUSES = (
    "correct",
    "refused",
    "wrong",
    "crashed",
    "trace failed",
    "limit",
    "not built",
    "benchmark failed",
)
RIVAL = (
    "correct",
    "softmax scale",
    "differs",
    "runs",
    "silent no-op",
    "exception",
    "hang",
    "not built",
)
REASONS = 60  # lines at most in each table of reasons


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cell(text: str, most: int = 170) -> str:
    """Fit for a cell of a table."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 1] + "…"


def of_family(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {
        f: [r for r in results if r["family"] == f]
        for f in FAMILIES
        if any(r["family"] == f for r in results)
    }


def seconds(r: Result) -> float | None:
    """Tracing and pruning; None where either did not end."""
    if "trace_seconds" not in r or r["status"] in ("limit", "crashed"):
        return None
    return r["trace_seconds"] + r.get("prune_seconds", 0.0)


def alone(r: Result) -> float | None:
    """A graph and one cut, as Torch-Pruning's seconds are; None where nothing was cut."""
    return r.get("bare_seconds") if r["status"] == "correct" else None


def compared(r: Result) -> bool:
    """Whether its outputs were compared with a masked original, and not only seen to run."""
    return "difference" in r or r.get("norm_difference", 1) < 1e-6


def middle(values: Iterable[float | None], form: str = "{:.2f}") -> str:
    known = [v for v in values if v is not None]
    return form.format(median(known)) if known else "-"


def summary(results: Sequence[Result]) -> list[str]:
    """A table, one line for each family."""
    lines = [
        "| family | models | traced | correct | of these compared | wrong | crashed | refused "
        "| time or memory up | share prunable "
        "| s | unchecked, s | Torch-Pruning, s | ratio | unchecked |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    everything = {**of_family(results), "all": list(results)}
    for family, mine in everything.items():
        count = Counter(r["status"] for r in mine)
        both = [(s, t) for r in mine if (s := seconds(r)) and (t := r["rival"].get("seconds"))]
        bare = [(s, t) for r in mine if (s := alone(r)) and (t := r["rival"].get("seconds"))]
        cells = [
            family,
            f"{len(mine)}",
            f"{sum('trace_seconds' in r for r in mine)}",
            f"{count['correct']}",
            f"{sum(compared(r) for r in mine if r['status'] == 'correct')}",
            f"{count['wrong']}",
            f"{count['crashed']}",
            f"{count['refused']}",
            f"{count['limit']}",
            middle((r.get("share") for r in mine), "{:.1%}"),
            middle(s for s, _ in both) if both else middle(seconds(r) for r in mine),
            middle(s for s, _ in bare) if bare else middle(alone(r) for r in mine),
            middle(t for _, t in both),
            middle(s / t for s, t in both if t > 0),
            middle(s / t for s, t in bare if t > 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rival_summary(results: Sequence[Result]) -> list[str]:
    lines = ["| family | " + " | ".join(RIVAL) + " |", "|---" * (len(RIVAL) + 1) + "|"]
    for family, mine in of_family(results).items():
        count = Counter(r["rival"].get("status") for r in mine)
        lines.append("| " + " | ".join([family, *(str(count[s]) for s in RIVAL)]) + " |")
    return lines


def row(r: Result) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    rival, size = r["rival"], r.get("parameters") or 0
    left, theirs = r.get("parameters_after"), rival.get("parameters_after")
    notes = [r.get("note", "")]
    if rival.get("status") not in (None, "correct") and rival.get("note"):
        notes.append(f"Torch-Pruning: {cell(rival['note'], 90)}")
    cells = [
        r["name"],
        r["status"],
        number(r.get("share"), "{:.1%}"),
        f"{r.get('prunable', 0)} of {r.get('groups', 0)}",
        number(1 - left / size if left and size else None, "{:.0%}"),
        number(r.get("difference"), "{:.0e}"),
        number(r.get("effect"), "{:.0e}"),
        number(r.get("norm_difference"), "{:.0e}"),
        number(r.get("trace_seconds"), "{:.2f}"),
        number(r.get("prune_seconds"), "{:.2f}"),
        number(r.get("bare_seconds"), "{:.2f}"),
        rival.get("status", "-"),
        number(1 - theirs / size if theirs and size else None, "{:.0%}"),
        number(rival.get("seconds"), "{:.2f}"),
        cell("; ".join(n for n in notes if n), 240),
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| model | status | share prunable | prunable groups | removed | difference | masking moves it by "
    "| inexact, norms masked | trace, s | prune, s | unchecked, s | Torch-Pruning | it removed | its s | note |\n"
    + "|---" * 15
    + "|"
)


def kind(reason: str) -> str:
    """A reason that many models can share: without its place, names and numbers."""
    text = reason.removeprefix("the model's code does not follow a removal: ")
    text = re.sub(r" ?\((?:[\w<>.-]+\.py|[\w.<>-]+):\d+.*", "", text)
    text = re.sub(r" in (?:the model|[\w.-]*\d[\w.-]*|[\w-]+(?:\.[\w-]+)+)(?=$|[ ,;:])", "", text)
    text = re.sub(r"'?\[[^\]]*\]'?", "[…]", text)
    return re.sub(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", "N", text).strip()


def reasons(results: Sequence[Result], key: str) -> list[str]:
    models: Counter[str] = Counter()
    places: Counter[str] = Counter()
    example: dict[str, str] = {}
    for r in results:
        mine: Counter[str] = Counter()
        for reason, n in r.get(key, {}).items():
            mine[kind(reason)] += n
        for what, n in mine.items():
            models[what] += 1
            places[what] += n
            example.setdefault(what, f"{r['family']}/{r['name']}")
    lines = [
        f"| {cell(w, 200)} | {n} | {places[w]} | {example[w]} |"
        for w, n in models.most_common(REASONS)
    ]
    if len(models) > REASONS:
        lines.append(f"| and {len(models) - REASONS} more reasons | | | |")
    return lines


def depth(results: Sequence[Result]) -> list[str]:
    mine = [r for r in results if r["family"] == "depth" and "trace_seconds" in r]
    if len(mine) < 2:
        return []
    lines = [
        "",
        "## Depth",
        "",
        "The same small Llama with more layers: does the time grow with their number alone?",
        "",
    ]
    lines += [
        "| layers | trace, s | per layer, ms | prune, s | unchecked, s | Torch-Pruning, s | per layer, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in mine:
        n, theirs = int(r["name"].rpartition("_")[2]), r["rival"].get("seconds")
        cells = [f"{n}", f"{r['trace_seconds']:.2f}", f"{1000 * r['trace_seconds'] / n:.0f}"]
        cells += [f"{r.get('prune_seconds', 0):.2f}", f"{r.get('bare_seconds', 0):.2f}"]
        cells += [f"{theirs:.2f}", f"{1000 * theirs / n:.0f}"] if theirs else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: Sequence[Result], missing: Sequence[str], limit: int, theirs: int) -> str:
    packages = ("torch", "torchvision", "transformers", "timm", "torch-pruning")
    versions = ", ".join(f"{p} {v}" for p in packages if (v := installed(p)))
    count = Counter(r["status"] for r in results)
    lines = [
        "# Coverage",
        "",
        "Written by `python benchmarks/coverage.py --write` on "
        f"{datetime.date.today().isoformat()}: {versions}, Python {platform.python_version()},",
        f"{platform.system()} {platform.machine()} of {os.cpu_count()} cores, one thread for each model. Models are "
        "randomly initialised.",
        "",
        f"**{len(results)} models: "
        + ", ".join(f"{count[s]} {s}" for s in STATUSES if count[s])
        + ".**",
        *[f"\n{m}" for m in missing],
        "",
        "Each model goes through the public calls, in a process of its own: `track_model`, `structure`, then one",
        "`prune_units` of 30% of every exact group (of groups that share places, heads and their dimensions, one,",
        "at random), a second one for the groups that are not exact, then forward, backward and a step of AdamW, whose",
        "state was there before, in train mode and in eval mode (detectors are given targets).",
        "Constants (norms, biases, layer scales, statistics) are made random first.",
        "",
        "- **correct**: after the exact call the outputs equal those of the original with zeros in the units' place,",
        "  made by the benchmark and not by the library, to 1e-6 relative in float64 (1e-3 for models of more than 100",
        "  million parameters and where an operation knows no float64, in float32); the rest ran, and stayed finite.",
        "  Of a model without exact groups that is all; those that were compared with a masked original are counted.",
        "- **refused**: an error of the library before anything was touched, or no group is prunable; what was not",
        "  refused was correct.",
        "- **wrong**, **crashed** (raised something else, or left the model torn): faults of the library.",
        f"- **limit**: not done in {limit} s, or out of memory.",
        "- *masking moves it by*: how far the removal moves the output at all: the comparison is not blind.",
        "- *inexact, norms masked*: for information, how far both removals are from the masked original whose norms go",
        "  over the kept channels; where a softmax's scale or a mean changes, it is not zero.",
        "",
        *summary(results),
        "",
        "Shares and seconds are medians. Seconds are CPU seconds of one thread: those of the library with trials,",
        "verification, two calls and a second trace; *unchecked*: as Torch-Pruning's seconds are, a graph and one",
        "cut, without trial and verification. Medians and ratios are over the models that both ended.",
    ]
    if any(r["rival"] for r in results):
        lines += [
            "",
            "## Torch-Pruning beside it",
            "",
            "The same models, weights and inputs, 30% of each group by magnitude as its examples do: output layers",
            "ignored, heads of attention named (whole heads in transformers, dimensions elsewhere), attributes that it",
            "leaves to its user set afterwards. *softmax scale*: equal only when attention is scaled as before.",
            "*differs*: from the masked original with norms over the kept channels. *runs*: its mask cannot be told.",
            f"*hang*: not done in {min(limit, theirs)} s, or out of memory.",
            "",
            *rival_summary(results),
        ]
    lines += depth(results)
    for family, mine in of_family(results).items():
        about = FAMILIES[family].about
        lines += [
            "",
            f"## {family.capitalize()}",
            "",
            f"{about[0].upper()}{about[1:]}.",
            "",
            HEAD,
            *map(row, mine),
        ]
    for title, key in (("What is refused", "refused"), ("What is frozen", "frozen")):
        if found := reasons(results, key):
            unit = "groups" if key == "refused" else "dimensions of tensors"
            lines += [
                "",
                f"## {title}",
                "",
                f"By reason, the most frequent first.\n\n| reason | models | {unit} | for example |",
            ]
            lines += ["|---|---|---|---|", *found]
    return "\n".join(lines) + "\n"

"""One HTML page of a run, self-contained, to mail around: pictures, layers, decisions, changes."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.analysis.epoch_history import TrainingHistory
from tracker.analysis.findings import LayerFindings, layer_statistics
from tracker.journal import Journal
from tracker.observation.records import Observation
from tracker.reporting import figures
from tracker.reporting.timeline import life
from tracker.training import SelfModification
from tracker.utils.files import write_whole
from tracker.utils.text import in_line, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 400
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 3px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } dl { display: grid; grid-template-columns: max-content auto; gap: 2px 16px; }
dt { color: #777; } dd { margin: 0; } pre { font-size: 12px; overflow-x: auto; } summary { cursor: pointer; }
"""
Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Run:
    """All that a page may show of one model; what is None or empty is left out."""

    name: str
    observation: Observation
    findings: Mapping[str, LayerFindings]
    history: TrainingHistory
    journal: Journal
    parameters: int
    structure: str = ""
    run: SelfModification | None = None
    more: Mapping[str, str] = field(default_factory=dict)  # title → plain text


def write(run: Run, path: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all; folders are made."""
    return write_whole(path, render(run).encode())


def render(run: Run) -> str:
    """The page as text. Names of layers are data: nothing in them is taken for HTML."""
    title = escape(f"{run.name}: a network and its life")
    body = "\n".join(_body(run))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _body(run: Run) -> Iterator[str]:
    yield _facts(run)
    modified = run.run if run.run is not None and run.run.steps else None
    if modified is not None:
        yield "<h2>Life</h2>"
        yield _picture(life(modified, run.journal, run.name), "widths, changes and loss over steps")
    yield "<h2>Layers</h2>"
    yield _layers(run)
    if any(found.observed.any() for found in run.findings.values()):
        yield _picture(figures.activity_heatmap(run.observation, run.findings), "activity")
    if run.history.epochs:
        yield "<h2>Training</h2>"
        yield _picture(figures.evolution(run.history), "loss, accuracy and firing over epochs")
    yield f"<h2>Changes</h2>{_changes(run.journal)}"
    if modified is not None:
        rows = [
            (d.step, d.what, d.why, f"{d.loss:.4f}" if d.loss == d.loss else "", d.parameters)
            for d in modified.life
        ]
        yield "<h2>Decisions</h2>"
        yield _table(("step", "what", "why", "loss", "parameters"), rows)
        yield _folded("Policy", str(modified.policy))
    if run.structure:
        yield _folded("Structure", run.structure)
    for title, text in run.more.items():
        yield _folded(title, text)


def _facts(run: Run) -> str:
    born = {i for entry in run.journal for i in entry.added_ids}
    died = {i for entry in run.journal for i in entry.removed_ids}
    facts = {
        "written": datetime.now().astimezone().isoformat(timespec="minutes"),
        "parameters": f"{run.parameters:,}",
        "neurons": f"{sum(len(f.layer.ids) for f in run.findings.values()):,} in {len(run.findings)} layers",
        "changes": f"{len(run.journal)}; {len(born):,} neurons born, {len(died):,} died",
    }
    if run.journal:
        facts["parameters before the first change"] = f"{run.journal[0].parameters_before:,}"
    if run.history.epochs and run.history.epochs[-1].accuracy is not None:
        facts["accuracy, as last logged"] = f"{run.history.epochs[-1].accuracy:.2%}"
    return (
        f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"
    )


def _layers(run: Run) -> str:
    rows: list[Sequence[Cell]] = []
    for name, found in run.findings.items():
        s = layer_statistics(found)
        seen = s["observed_neurons"] > 0
        rows.append(
            (
                name or "(model)",
                s["layer_type"],
                s["total_neurons"],
                s["dead_neurons"] if seen else None,
                s["constant_neurons"] if seen else None,
                f"{s['avg_firing_frequency']:.1%}" if seen else "not observed",
            )
        )
    return _table(("layer", "type", "neurons", "dead", "constant", "fires"), rows)


def _changes(journal: Journal) -> str:
    if not journal:
        return "<p>None.</p>"
    rows = [
        (
            e.number,
            e.operation,
            e.step,
            e.epoch,
            ", ".join(f"{len(units)} of {group}" for group, units in e.units.items()),
            len(e.removed_ids),
            len(e.added_ids),
            f"{e.parameters_before:,} → {e.parameters_after:,}",
            e.promise,
            "" if e.output_difference is None else f"{e.output_difference:.1e}",
        )
        for e in journal
    ]
    heads = ("", "operation", "step", "epoch", "units", "gone", "new", "parameters", "promise")
    return _table((*heads, "measured difference"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def cell(value: Cell) -> str:
        if isinstance(value, (int, float)):
            return f'<td class="number">{value:,}</td>'
        return f"<td>{escape(value or '')}</td>"

    shown = [f"<tr>{''.join(map(cell, row))}</tr>" for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        shown.append(f'<tr><td colspan="{len(heads)}">and {len(rows) - MAX_ROWS} more</td></tr>')
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(shown)}</tbody></table>"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{html.escape(plain(text))}</pre></details>"


def _picture(fig: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def escape(text: str) -> str:
    """Text in one line of a page: neither HTML nor characters that HTML does not have."""
    return html.escape(in_line(text))

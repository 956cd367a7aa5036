"""The life of a network, drawn: widths, births and deaths, loss and accuracy on one axis of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tracker.errors import StatisticsError
from tracker.journal import Journal
from tracker.reporting.figures import new_figure
from tracker.training import Decision, SelfModification
from tracker.utils.text import in_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "prune_units": "#d62728",
    "merge_neurons": "#9467bd",
    "compress": "#8c564b",
    "expand_layer": "#2ca02c",
    "recycle_neurons": "#17becf",
    "insert_layer": "#bcbd22",
    "remove_layer": "#7f7f7f",
}
WORDS = {
    "prune_units": "pruned",
    "merge_neurons": "merged",
    "compress": "compressed",
    "expand_layer": "expanded",
    "recycle_neurons": "recycled",
    "insert_layer": "layer inserted",
    "remove_layer": "layer removed",
}
MAX_LINES = 14  # layers drawn; the others change less


def life(run: SelfModification, journal: Journal, name: str) -> Figure:
    """What became of a network since `start_self_modification`.

    Raises:
        StatisticsError: No step was taken yet.
    """
    if not run.steps:
        raise StatisticsError("The run has no life to draw yet: call step(loss) after each step.")
    fig = new_figure(11, 9)
    widths, sizes, changes, losses = fig.subplots(4, 1, sharex=True, height_ratios=(2, 1, 1.2, 1.6))
    _widths(widths, run)
    _sizes(sizes, run)
    _changes(changes, journal, run.steps)
    _losses(losses, run)
    for ax in (widths, sizes, changes, losses):
        _marks(ax, run.life)
        ax.grid(alpha=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    losses.set_xlabel("steps")
    losses.set_xlim(0, run.steps)
    first, last = run.life[0], run.life[-1]
    fig.suptitle(
        f"The life of {in_picture(name)}: {run.steps:,} steps, {first.parameters:,} → {last.parameters:,} parameters",
        fontsize=12,
    )
    return fig


def _widths(ax: Axes, run: SelfModification) -> None:
    seen: dict[str, list[int]] = {}
    for decision in run.life:
        for layer, width in decision.widths.items():
            seen.setdefault(layer, []).append(width)
    moved = {n: w for n, w in seen.items() if len(set(w)) > 1 or len(w) < len(run.life)}
    by_change = sorted(moved, key=lambda n: max(moved[n]) - min(moved[n]), reverse=True)
    shown = set(by_change[:MAX_LINES])
    together: dict[tuple[float, ...], list[str]] = {}  # a norm is as wide as what it follows
    for layer in (n for n in seen if n in shown):
        line = tuple(float(d.widths.get(layer, math.nan)) for d in run.life)
        together.setdefault(line, []).append(layer)
    for line, layers in together.items():
        label = in_picture(layers[0])
        label += f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        steps = [d.step for d in run.life]
        ax.step([*steps, run.steps], [*line, line[-1]], where="post", label=label, linewidth=1.8)
    ax.set_ylabel("neurons")
    ax.set_ylim(bottom=0)
    if together:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    still = len(seen) - len(shown)
    if still:
        more = "1 more layer changes" if still == 1 else f"{still} more layers change"
        ax.set_title(f"{more} less, or not at all", fontsize=8, loc="right")


def _sizes(ax: Axes, run: SelfModification) -> None:
    steps = [*(d.step for d in run.life), run.steps]
    sizes = [*(d.parameters for d in run.life), run.life[-1].parameters]
    ax.fill_between(steps, sizes, step="post", color="#1f77b4", alpha=0.3, linewidth=0)
    ax.step(steps, sizes, where="post", color="#1f77b4", linewidth=1.2)
    ax.set_ylabel("parameters")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")


def _changes(ax: Axes, journal: Journal, steps: int) -> None:
    labelled: set[str] = set()
    entries = [e for e in journal if e.step is not None]
    for entry in entries:
        assert entry.step is not None
        color = COLORS[entry.operation]
        label = WORDS[entry.operation] if entry.operation not in labelled else None
        labelled.add(entry.operation)
        for count in (len(entry.added_ids), -len(entry.removed_ids)):
            if count:
                ax.bar(entry.step, count, width=steps / 150, color=color, label=label)
                label = None
        if label is not None:  # no neuron came or went
            ax.plot(entry.step, 0, marker="D", color=color, linestyle="", label=label)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("neurons gone  |  new")
    ax.yaxis.set_major_formatter(lambda value, place: f"{abs(value):,.0f}")
    if labelled:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)


def _losses(ax: Axes, run: SelfModification) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = [(step, loss) for step, loss in run.losses if math.isfinite(loss)]
    steps, values = _columns(finite)
    ax.plot(steps, values, color="#d62728", linewidth=0.8, alpha=0.35)
    ax.plot(steps, _smooth(values), color="#d62728", linewidth=1.5)
    ax.set_ylabel("training loss", color="#d62728")
    if values and min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if run.accuracies:
        right = ax.twinx()
        right.plot(*_columns(run.accuracies), color="#1f77b4", marker="o", markersize=4)
        right.set_ylabel("accuracy", color="#1f77b4")
        right.spines[["top"]].set_visible(False)


def _marks(ax: Axes, decisions: Iterable[Decision]) -> None:
    """Where something was tried and did not last."""
    for decision in decisions:
        if decision.what in ("undone", "refused"):
            color = "#ff7f0e" if decision.what == "undone" else "#9467bd"
            ax.axvline(decision.step, color=color, alpha=0.6, linewidth=1, linestyle=":")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last sixtieth of all points."""
    window = max(len(values) // 60, 1)
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

"""Findings → pictures. Each function draws a matplotlib figure and returns it; nothing is shown or saved here.

matplotlib is imported when a picture is drawn, not with the library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracker.analysis.epoch_history import TrainingHistory
from tracker.analysis.findings import LayerFindings
from tracker.errors import StatisticsError
from tracker.observation.records import Observation
from tracker.utils.files import write_picture
from tracker.utils.notebook import inline
from tracker.utils.text import in_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS = 24  # drawn in one figure
MAX_CELLS = 500  # side of a correlation picture; larger layers are pooled
DEAD, UNSEEN = "#d62728", "#d9d9d9"


def activity_heatmap(observation: Observation, findings: Mapping[str, LayerFindings]) -> Figure:
    """Firing frequency and mean activation of every neuron, a panel for each layer; dead neurons in red."""
    layers = [f for f in findings.values() if f.observed.any()]
    if not layers:
        raise StatisticsError("Nothing was observed, so there is nothing to draw.")
    shown = layers[:MAX_LAYERS]
    shapes = [_grid(len(f.layer.ids)) for f in shown]
    heights = [0.45 + 5.0 * rows / max(columns, 16) for rows, columns in shapes]
    fig = new_figure(13, sum(heights) + 1.9)
    grid = fig.add_gridspec(len(shown), 2, height_ratios=heights)
    for row, (found, shape) in enumerate(zip(shown, shapes, strict=True)):
        left, right = fig.add_subplot(grid[row, 0]), fig.add_subplot(grid[row, 1])
        a = found.layer.activity
        _cells(left, a.firing_frequency, shape, "viridis", (0, 1), found.dead)
        largest = _robust_limit(a.mean[found.observed])
        _cells(right, a.mean, shape, "RdBu_r", (-largest, largest), None)
        right.set_title(f"mean activation, limit of colors: {largest:.3g}", fontsize=9, loc="left")
        average = float(a.firing_frequency[found.observed].mean())
        left.set_title(
            f"{in_picture(found.layer.label)}: {len(found.layer.ids)} neurons, {int(found.dead.sum())} dead, "
            f"fires in {average:.1%} of observations",
            fontsize=9,
            loc="left",
        )
    lefts, rights = fig.axes[::2], fig.axes[1::2]
    _bar(fig, lefts, "viridis", (0, 1), "firing frequency (red: dead, grey: not observed)")
    _bar(fig, rights, "RdBu_r", (-1, 1), "mean activation / limit of its layer")
    more = f", first {MAX_LAYERS} of {len(layers)} layers" if len(layers) > MAX_LAYERS else ""
    fig.suptitle(
        f"Neuron activity of {in_picture(observation.model)}: {observation.samples:,} samples, "
        f"{observation.mode} mode{more}",
        fontsize=11,
    )
    return fig


def correlation_matrix(found: LayerFindings, threshold: float) -> Figure:
    """Pearson correlations of one layer, ordered so that neurons that move together lie together."""
    covariance = found.layer.covariance
    if covariance is None:
        raise StatisticsError(
            "Correlation was not observed. Begin the window with start_tracking(enable_correlation_analysis=True)."
        )
    r = covariance.correlation()
    r[found.constant] = torch.nan
    r[:, found.constant] = torch.nan
    moving = (~found.constant & (covariance.count > 1)).nonzero().flatten()
    pairs = found.pairs(threshold)
    if len(moving) < 2:
        raise StatisticsError(
            f"{found.layer.label} has no two neurons to compare: of {len(found.layer.ids)}, "
            f"{int(found.constant.sum())} are constant and {int(found.unreliable.sum())} not finite."
        )
    order = moving[cluster_order(r[moving][:, moving], pairs, moving)]
    cells = _pool(r[order][:, order].numpy())
    fig = new_figure(7.2, 6.4)
    ax = fig.add_subplot()
    image = ax.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    n = len(found.layer.ids)
    pooled = (
        f"; a cell is the strongest of {math.ceil(len(order) / len(cells))}² pairs"
        if len(order) > len(cells)
        else ""
    )
    still = f", {n - len(order)} constant left out" if len(order) < n else ""
    ax.set_title(
        f"{in_picture(found.layer.label)}: correlation of {len(order)} neurons{still}\n"
        f"{len(pairs)} pairs with |r| ≥ {threshold:g}{pooled}",
        fontsize=10,
    )
    if len(order) <= 40:
        ax.set_xticks(range(len(order)), order.tolist(), rotation=90, fontsize=6)
        ax.set_yticks(range(len(order)), order.tolist(), fontsize=6)
        ax.set_xlabel("local index, clustered")
    else:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("neurons, clustered")
    fig.colorbar(image, ax=ax, label="Pearson correlation", fraction=0.046, pad=0.03)
    return fig


def evolution(history: TrainingHistory) -> Figure:
    """Loss, accuracy, and how often the neurons of each layer fire, over the logged epochs."""
    if not history.epochs:
        raise StatisticsError("The history is empty. Log epochs with log_epoch_statistics first.")
    fig = new_figure(10, 8)
    top, middle, bottom = fig.subplots(3, 1, sharex=True, height_ratios=(1, 1.2, 1.2))
    epochs = range(len(history.epochs))
    _line(top, epochs, [e.loss for e in history.epochs], "#d62728")
    top.grid(alpha=0.25)
    top.set_ylabel("loss", color="#d62728")
    right = top.twinx()
    _line(right, epochs, [e.accuracy for e in history.epochs], "#1f77b4")
    right.set_ylabel("accuracy", color="#1f77b4")
    _bands(middle, epochs, _series_by_layer(history, 2), "firing frequency")
    low, high = middle.get_ylim()
    middle.set_ylim(min(low, 0.88), max(high, 1.01))
    deviations = {k: np.sqrt(v) for k, v in _series_by_layer(history, 1).items()}
    _bands(bottom, epochs, deviations, "standard deviation")
    bottom.set_xlabel("epoch")
    bottom.set_xticks(*_ticks([e.epoch for e in history.epochs]))
    middle.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    fig.suptitle(
        f"Training history, {len(history.epochs)} epochs. Lower panels: a layer's median neuron, and its 10th to "
        "90th percentile",
        fontsize=10,
    )
    return fig


def save(fig: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the picture to `path`, if there is one, whole or not at all; the ending tells the format.

    Raises:
        WriteError: It cannot be written, or no picture has such an ending.
    """
    if path is not None:
        write_picture(path, fig)
    return fig


def show(fig: Figure) -> None:
    """Open the picture in a window or a notebook; without either, do nothing."""
    import matplotlib
    from matplotlib import pyplot as plt

    if "inline" in matplotlib.get_backend().lower():
        from IPython.display import display

        display(fig)
    elif matplotlib.get_backend().lower() not in ("agg", "pdf", "ps", "svg", "cairo", "template"):
        # pyplot opens windows for its own figures only: lend one's window to ours.
        manager = plt.figure().canvas.manager
        if manager is not None:
            manager.canvas.figure = fig
            fig.set_canvas(manager.canvas)
            plt.show()


def cluster_order(
    r: torch.Tensor, pairs: Sequence[tuple[int, int, float]], slots: torch.Tensor
) -> torch.Tensor:
    """Positions of `slots` in an order that puts groups of redundant neurons first, then the rest by similarity.

    Similarity is the angle in the plane of the two leading eigenvectors of the correlations. Source: M. Friendly,
    "Corrgrams" (2002), angular order of the eigenvectors.
    """
    n = len(slots)
    if n < 3:
        return torch.arange(n)
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)  # the low-rank decomposition is randomised; same input, same picture
    try:
        u, _, _ = torch.svd_lowrank(torch.nan_to_num(r), q=min(n, 6))
    finally:
        torch.random.set_rng_state(generator)
    angle = torch.atan2(u[:, 1], u[:, 0])
    place = {int(s): i for i, s in enumerate(slots)}
    group = list(range(n))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for i, j, _ in pairs:
        group[root(place[j])] = root(place[i])
    roots = [root(i) for i in range(n)]
    size = {g: roots.count(g) for g in set(roots)}
    keys = [
        (-size[g] if size[g] > 1 else 0, float(angle[g]), g, float(angle[i]))
        for i, g in enumerate(roots)
    ]
    return torch.tensor(sorted(range(n), key=lambda i: keys[i]))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no window, no global state, nothing left open in a training script.
    fig = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(fig)
    return inline(fig)


def _grid(n: int) -> tuple[int, int]:
    """Rows and columns that show n neurons in a wide, short panel."""
    columns = max(16, n) if n <= 32 else max(32, math.ceil(math.sqrt(n * 8)))
    return math.ceil(n / columns), columns


def _cells(
    ax: Axes,
    values: torch.Tensor,
    shape: tuple[int, int],
    cmap: str,
    limits: tuple[float, float],
    dead: torch.Tensor | None,
) -> None:
    """Draw one value for each neuron, row by row; grey where it was not observed, red where `dead`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    size = len(values)
    image = colormaps[cmap]((values.numpy() - limits[0]) / (limits[1] - limits[0]))
    image[values.isnan().numpy()] = to_rgba(UNSEEN)
    if dead is not None:
        image[dead.numpy()] = to_rgba(DEAD)
    cells = np.zeros((shape[0] * shape[1], 4))  # transparent behind the last neuron
    cells[:size] = image
    ax.imshow(cells.reshape(*shape, 4), aspect="equal", interpolation="nearest")
    _frame(ax, shape)


def _frame(ax: Axes, shape: tuple[int, int]) -> None:
    """White lines between cells that are large enough, and no axis: a position is read by counting."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if shape[1] <= 64:
        ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)


def _bar(
    fig: Figure, axes: Sequence[Axes], cmap: str, limits: tuple[float, float], label: str
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(*limits), cmap)
    fig.colorbar(scale, ax=axes, location="bottom", fraction=0.03, pad=0.02, aspect=50, label=label)


def _robust_limit(values: torch.Tensor) -> float:
    """98th percentile of magnitudes: one outlier must not bleach the picture."""
    return float(np.percentile(values.abs().numpy(), 98)) or 1.0


def _pool(r: np.ndarray) -> np.ndarray:
    """At most MAX_CELLS rows and columns; a cell keeps the strongest correlation of its block."""
    factor = math.ceil(len(r) / MAX_CELLS)
    if factor <= 1:
        return r
    side = math.ceil(len(r) / factor)
    full = np.zeros((side * factor, side * factor))
    full[: len(r), : len(r)] = np.nan_to_num(r)
    blocks = full.reshape(side, factor, side, factor).transpose(0, 2, 1, 3).reshape(side, side, -1)
    strongest = np.abs(blocks).argmax(-1)[..., None]
    return np.take_along_axis(blocks, strongest, -1)[..., 0]


def _series_by_layer(history: TrainingHistory, column: int) -> dict[str, np.ndarray]:
    """Layer → (neurons, epochs) of one statistic, NaN where a neuron did not live or was not observed."""
    members: dict[str, list[int]] = {}
    for neuron, (layer, _) in history.layers.items():
        members.setdefault(layer, []).append(neuron)
    tables = {}
    for layer, ids in members.items():
        rows = [[_entry(e.neurons.get(n), column) for e in history.epochs] for n in ids]
        tables[layer] = np.array(rows, dtype=float)
    return tables


def _entry(row: tuple[Any, Any, Any] | None, column: int) -> float:
    return math.nan if row is None or row[column] is None else row[column]


def _bands(ax: Axes, x: Sequence[int], tables: Mapping[str, np.ndarray], label: str) -> None:
    for name, table in tables.items():
        seen = ~np.isnan(table).all(axis=0)  # an epoch without any value has no percentile
        if not seen.any():
            continue
        low, middle, high = np.full((3, len(seen)), np.nan)
        low[seen], middle[seen], high[seen] = np.nanpercentile(table[:, seen], [10, 50, 90], axis=0)
        (line,) = ax.plot(x, middle, marker="o", markersize=4, label=in_picture(name or "(model)"))
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set_ylabel(label)
    ax.grid(alpha=0.25)


def _line(ax: Axes, x: Sequence[int], y: Sequence[float | None], color: str) -> None:
    values = [math.nan if v is None else v for v in y]
    ax.plot(x, values, marker="o", markersize=4, color=color, alpha=0.8)


def _ticks(epochs: Sequence[int]) -> tuple[list[int], list[str]]:
    step = max(1, math.ceil(len(epochs) / 15))
    at = list(range(0, len(epochs), step))
    return at, [str(epochs[i]) for i in at]

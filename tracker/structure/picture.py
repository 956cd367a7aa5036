"""The groups of a small model as a picture: layers from left to right, each group a ribbon past all that it touches.

matplotlib is imported when a picture is drawn, not with the library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracker.errors import StructureError
from tracker.structure.units import Frozen, Place, UnitGroup
from tracker.utils.notebook import inline
from tracker.utils.text import in_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS = 60
COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#17becf", "#8c564b", "#e377c2", "#bcbd22",
)  # fmt: skip
NAMES = {
    "residual": "in the residual stream",
    "embedding": "embedding dimensions",
    "head_dim": "head dimensions",
    "hidden": "hidden units",
}
FROZEN, LINE = "#b5b5b5", "#404040"
STUB = 0.62  # how far a frozen axis reaches
PORT = 0.17  # how far left of its layer's middle a ribbon is read, and right of it is made


@dataclass(slots=True)
class _Ribbon:
    """What runs from layer to layer: a group, or a frozen axis (a stub at one layer)."""

    label: str
    size: int
    color: str
    stops: dict[int, set[str]]  # column → roles there
    exact: bool = True
    stub: bool = False
    lane: int = 0

    @property
    def span(self) -> tuple[float, float]:
        """Where it begins and ends, in columns."""
        first, last = min(self.stops), max(self.stops)
        made = "produces" in self.stops[first]
        if self.stub:
            return (first + PORT, first + STUB) if made else (first - STUB, first - PORT)
        end = PORT if self.stops[last] == {"produces"} else -PORT
        return first + (PORT if made else -PORT), last + end


def draw(
    groups: Sequence[UnitGroup], frozen: Sequence[Frozen], sizes: Mapping[Place, int]
) -> Figure:
    """One column for each layer, in the order of the forward pass, one ribbon for each group.

    sizes: (tensor, dimension) → indices; in the order in which the forward pass meets the tensors.

    Raises:
        StructureError: The model has too many layers for a picture.
    """
    layers = list(dict.fromkeys(_layer(tensor) for tensor, _ in sizes))
    if len(layers) > MAX_LAYERS:
        raise StructureError(
            f"The model has {len(layers)} layers: a picture can show {MAX_LAYERS}. print(structure) shows all."
        )
    ribbons = _ribbons(groups, frozen, sizes, layers)
    lanes = _laid_out(ribbons)
    fig, ax = _canvas(len(layers), lanes)
    for column, name in enumerate(layers):
        _column(ax, column, name, [r for r in ribbons if column in r.stops], lanes)
    largest = max((r.size for r in ribbons), default=1)
    for ribbon in ribbons:
        _ribbon(ax, ribbon, largest)
    _legend(ax, ribbons)
    return fig


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0].removesuffix(".parametrizations.weight") or tensor


def _ribbons(
    groups: Sequence[UnitGroup],
    frozen: Sequence[Frozen],
    sizes: Mapping[Place, int],
    layers: Sequence[str],
) -> list[_Ribbon]:
    found, colors = [], 0
    for group in groups:
        stops: dict[int, set[str]] = {}
        for (tensor, _), role in group.roles.items():
            stops.setdefault(layers.index(_layer(tensor)), set()).add(role)
        color = COLORS[colors % len(COLORS)] if group.prunable else FROZEN
        colors += group.prunable
        label = f"{group.size} {NAMES.get(group.kind, group.kind + 's')}"
        if group.multiple_of > 1:
            label += f", by {group.multiple_of}"
        if not group.prunable:
            label += ", pinned"
        found.append(_Ribbon(label, group.size, color, stops, group.exact))
    for place in frozen:
        if (side := _side(place, sizes)) is not None:
            stop, size = layers.index(_layer(place.tensor)), sizes[place.tensor, place.dim]
            found.append(_Ribbon(str(size), size, FROZEN, {stop: {side}}, stub=True))
    return found


def _side(place: Frozen, sizes: Mapping[Place, int]) -> str | None:
    """Whether a frozen dimension of a weight is what its layer makes or what it reads; None for what is neither."""
    dims = [d for t, d in sizes if t == place.tensor]
    if place.dim > 1 or len(dims) < 2:
        return None
    return ("produces", "reads")[place.dim ^ ("embedding" in place.reason)]


def _laid_out(ribbons: Sequence[_Ribbon]) -> int:
    """Give each ribbon the first lane that is free all along it; return how many lanes there are."""
    ends: list[list[tuple[float, float]]] = []
    for ribbon in sorted(ribbons, key=lambda r: (r.stub, r.span[0] - r.span[1])):
        start, end = ribbon.span
        free = (
            lane
            for lane, taken in enumerate(ends)
            if all(end + 0.2 < a or b + 0.2 < start for a, b in taken)
        )
        ribbon.lane = next(free, len(ends))
        if ribbon.lane == len(ends):
            ends.append([])
        ends[ribbon.lane].append((start, end))
    return len(ends)


def _canvas(columns: int, lanes: int) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(
        figsize=(max(5.0, 1.05 * columns + 1.2), 0.62 * lanes + 1.9), layout="constrained", dpi=130
    )
    FigureCanvasAgg(inline(fig))
    ax = fig.add_subplot()
    ax.set_xlim(-0.75, columns - 0.25)
    ax.set_ylim(lanes - 0.4, -0.6)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return fig, ax


def _column(ax: Axes, column: int, name: str, met: Sequence[_Ribbon], lanes: int) -> None:
    ys = [ribbon.lane for ribbon in met] or [0]
    ax.plot([column] * 2, [min(ys) - 0.3, max(ys) + 0.3], color=LINE, linewidth=6, alpha=0.18,
            solid_capstyle="round", zorder=1)  # fmt: skip
    ax.annotate(in_picture(name), (column, lanes - 0.45), rotation=35, ha="right", va="top", fontsize=8,
                annotation_clip=False)  # fmt: skip


def _ribbon(ax: Axes, ribbon: _Ribbon, largest: int) -> None:
    from matplotlib.patches import Rectangle

    start, end = ribbon.span
    height = 0.16 + 0.3 * math.sqrt(ribbon.size / largest)
    style: dict[str, Any] = {} if ribbon.exact else {"hatch": "////"}
    ax.add_patch(
        Rectangle((start, ribbon.lane - height / 2), end - start, height, facecolor=ribbon.color,
                  alpha=0.55, edgecolor="white", linewidth=0, zorder=2, **style)
    )  # fmt: skip
    for column, roles in ribbon.stops.items():
        for role in roles:
            x = column + {"produces": PORT, "reads": -PORT, "carries": 0.0}[role]
            marker = {"produces": "s", "reads": ">", "carries": "|"}[role]
            carried = role == "carries"
            ax.plot(x, ribbon.lane, marker, color=ribbon.color, markersize=16 if carried else 9,
                    markeredgecolor=LINE, markeredgewidth=2 if carried else 0.8, zorder=3)  # fmt: skip
            ax.plot([column, x], [ribbon.lane] * 2, color=LINE, linewidth=1.2, zorder=2.5)
    ax.text((start + end) / 2, ribbon.lane - height / 2 - 0.04, ribbon.label, fontsize=7.5,
            ha="center", va="bottom", zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6})  # fmt: skip


def _legend(ax: Axes, ribbons: Sequence[_Ribbon]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points = [("s", "makes the units"), ("|", "carries them"), (">", "reads them")]
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=m, color=LINE, markersize=7, label=label)
        for m, label in points
    ]
    handles.append(Patch(facecolor=FROZEN, alpha=0.55, label="cannot go"))
    if not all(r.exact for r in ribbons):
        handles.append(Patch(facecolor="white", edgecolor=LINE, hatch="////", label="not exact"))
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles),
              fontsize=8, frameon=False)  # fmt: skip

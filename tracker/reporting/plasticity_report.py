"""Dormant neurons, effective ranks and ages, layer by layer, for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tracker.utils.text import in_line, short


def plasticity_report(
    summary: Mapping[str, Mapping[str, Any]], ages: Mapping[str, Sequence[int]]
) -> str:
    """One line for each layer.

    Args:
        summary: By layer, as `plasticity` tells.
        ages: By layer, steps since its neurons came; empty without a run.
    """
    lines = [
        "PLASTICITY BY LAYER:",
        "-" * 80,
        f"{'Layer':<20} {'Neurons':<8} {'Dormant':<16} {'Effective rank':<16} {'Age, median (least)':<20}",
        "-" * 80,
    ]
    for name, row in summary.items():
        dormant, rank = len(row["dormant_ids"]), row["effective_rank"]
        share = row["dormant_share"]
        told = f"{dormant} ({share:.1%})" if share == share else "not observed"
        ranked = "-" if rank is None or rank != rank else f"{rank:.1f} of {row['neurons']}"
        mine = ages.get(name, ())
        aged = f"{statistics.median(mine):,.0f} ({min(mine):,})" if mine else "-"
        label = short(in_line(name or "(model)"), 20)
        lines.append(f"{label:<20} {row['neurons']:<8} {told:<16} {ranked:<16} {aged:<20}".rstrip())
    if summary:
        first = next(iter(summary.values()))
        measures = sorted({row["dormant_measure"] for row in summary.values()})
        most = f"{first['dormant_threshold']:g}"
        lines += [
            "",
            f"Dormant: up to {most} of the layer's mean of the {' or the '.join(measures)}.",
            "Effective rank: exp(entropy) of the singular values of a layer's features; needs correlation analysis.",
            "Age: steps of the run that modifies itself.",
        ]
    return "\n".join(lines)

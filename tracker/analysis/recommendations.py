"""Findings → recommendations: what a change of the network could begin with, and what each advice rests on.

Nothing is recommended twice or in conflict: a neuron to prune is not merged, a neuron is folded away once at most and
never into one that goes itself, and a layer that would lose neurons is not expanded. The model's own outputs are
left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tracker.analysis.findings import LayerFindings
from tracker.errors import StatisticsError
from tracker.observation.records import Observation

SCHEMA_VERSION = "1.1"
GROWTH = 0.25  # share of a layer's width that one expansion adds
TWIN_TOLERANCE = 0.01  # how far scale may be from 1 for averaging the weights to be right


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When to recommend what."""

    pruning: float = 0.01  # firing frequency below which a neuron is a candidate
    redundancy: float = 0.9  # |correlation| from which on a pair is
    saturation: float = (
        0.95  # share of its neurons that its consumers need from which on a layer is
    )

    def __post_init__(self) -> None:
        """Refuse what is not a share."""
        for name in ("pruning", "redundancy", "saturation"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise StatisticsError(
                    f"{name}_threshold is a share between 0 and 1, not {value!r}."
                )


def recommend(
    observation: Observation, findings: Mapping[str, LayerFindings], thresholds: Thresholds
) -> dict[str, Any]:
    """The recommendations, as the JSON Schema `tracker/schemas/optimization_recommendations.json` describes them.

    Merging needs correlation: without it `merge` is empty, and `metadata.notes` says so.
    """
    prune: list[dict[str, Any]] = []
    merge: list[dict[str, Any]] = []
    expand: list[dict[str, Any]] = []
    for found in findings.values():
        if not found.observed.any() or found.layer.is_output:
            continue
        gone = prune_layer(found, thresholds.pruning)
        folded = merge_layer(found, thresholds.redundancy, {c["local_index"] for c in gone})
        prune += gone
        merge += folded
        if not gone and not folded:
            expand += expand_layer(found, thresholds.saturation, observation.threshold)
    sizes = {f.layer.name: len(f.layer.ids) for f in findings.values()}
    return {
        "schema_version": SCHEMA_VERSION,
        "metadata": {
            "timestamp": datetime.now().isoformat(),
            "model_info": {
                "model_name": observation.model,
                "total_neurons": sum(sizes.values()),
                "total_layers": len(sizes),
                "layer_details": sizes,
            },
            "samples": observation.samples,
            "mode": observation.mode,
            "thresholds": {
                "activation": observation.threshold,
                "pruning": thresholds.pruning,
                "redundancy": thresholds.redundancy,
                "saturation": thresholds.saturation,
            },
            "notes": _notes(findings),
        },
        "prune": prune,
        "merge": merge,
        "expand": expand,
        "statistics": {
            "total_prunable_neurons": len(prune),
            "total_mergeable_pairs": len(merge),
            "layers_needing_expansion": len(expand),
        },
    }


def prune_layer(found: LayerFindings, threshold: float) -> list[dict[str, Any]]:
    """Dead, constant and rarely firing neurons of one layer; never all of them."""
    a, candidates = found.layer.activity, []
    low = (a.firing_frequency < threshold) & found.observed & ~found.unreliable
    for slot in (found.dead | found.constant | low).nonzero().flatten().tolist():
        reason = found.status(slot)
        candidates.append(
            {
                "neuron_id": found.layer.ids[slot],
                "layer_name": found.layer.name,
                "local_index": slot,
                "reason": "low_activity" if reason == "active" else reason,
                "firing_frequency": float(a.firing_frequency[slot]),
                "mean_activation": float(a.mean[slot]),
                "std_deviation": float(a.variance[slot].sqrt()),
            }
        )
    if len(candidates) == len(found.layer.ids):
        # A layer cannot lose its last neuron: the one that varies most stays.
        candidates.remove(max(candidates, key=lambda c: c["std_deviation"]))
    return candidates


def merge_layer(found: LayerFindings, threshold: float, gone: set[int]) -> list[dict[str, Any]]:
    """Pairs of one layer, the strongest first, in which the second can be folded into the first."""
    if found.layer.covariance is None:
        return []
    kept: set[int] = set()
    candidates = []
    pairs = sorted(found.pairs(threshold), key=lambda p: -abs(p[2]))
    for i, j, r in pairs:
        keep, drop = (j, i) if j in kept and i not in kept else (i, j)
        if gone & {keep, drop} or drop in kept:
            continue
        gone, kept = gone | {drop}, kept | {keep}
        share, scale, offset = found.explained_by(keep, drop)
        deviation = float(found.layer.activity.variance[drop].sqrt())
        twins = abs(scale - 1) < TWIN_TOLERANCE and abs(offset) < TWIN_TOLERANCE * deviation
        candidates.append(
            {
                "neuron_pair": [found.layer.ids[keep], found.layer.ids[drop]],
                "layer_name": found.layer.name,
                "local_indices": [keep, drop],
                "correlation": r,
                "merge_strategy": "average_weights" if twins else "affine_fold",
                # second ≈ scale · first + offset explains this share of the second's variance
                "explained_variance": share,
                "scale": scale,
                "offset": offset,
            }
        )
    return candidates


def expand_layer(
    found: LayerFindings, threshold: float, activation_threshold: float
) -> list[dict[str, Any]]:
    """A layer all of whose neurons are busy could use more; who knows what its consumers read knows better."""
    activity = float(found.layer.activity.firing_frequency[found.observed].mean())
    if activity < threshold:
        return []
    size = len(found.layer.ids)
    return [
        {
            "layer_name": found.layer.name,
            "current_size": size,
            "suggested_expansion": max(1, round(GROWTH * size)),
            "avg_activity": activity,
            "reason": "high_saturation",
            "basis": (
                f"on average {activity:.1%} of the observations of a neuron exceed {activation_threshold:g}, and "
                "none of the neurons is recommended to be pruned or merged; what growth would gain was not measured"
            ),
        }
    ]


def _notes(findings: Mapping[str, LayerFindings]) -> list[str]:
    notes = []
    layers = [f.layer for f in findings.values()]
    if outputs := [la.label for la in layers if la.is_output]:
        notes.append(f"left alone, the model's output: {', '.join(outputs)}")
    if unseen := [f.layer.label for f in findings.values() if not f.observed.any()]:
        notes.append(f"not observed, so nothing is said of: {', '.join(unseen)}")
    if why := next((la.fallback for la in layers if la.fallback), ""):
        notes.append(f"observed at layers' own outputs, not where they are read: {why}")
    if all(la.covariance is None for la in layers):
        notes.append(
            "correlation was not observed, so no merges, and of growth only firing tells: "
            "start_tracking(enable_correlation_analysis=True)"
        )
    return notes


def pruning_candidates(findings: Mapping[str, LayerFindings]) -> list[dict[str, Any]]:
    """All observed neurons of hidden layers, the least useful first.

    The score is the firing frequency, times the neuron's standard deviation over the mean one of its layer where that
    is below 1: a neuron that seldom fires, or hardly varies when it does, tells its consumers little.
    """
    rows = []
    for found in findings.values():
        if found.layer.is_output:
            continue
        a, observed = found.layer.activity, found.observed & ~found.unreliable
        deviation = a.variance.sqrt()
        typical = float(deviation[observed].mean()) if observed.any() else 0.0
        for slot in observed.nonzero().flatten().tolist():
            share = min(1.0, float(deviation[slot]) / typical) if typical else 0.0
            frequency = float(a.firing_frequency[slot])
            status = found.status(slot)
            rows.append(
                {
                    "neuron_id": found.layer.ids[slot],
                    "layer_name": found.layer.name,
                    "local_index": slot,
                    "status": {"dead": "DEAD", "constant": "CONST"}.get(status, "LOW"),
                    "score": frequency * share,
                    "firing_frequency": frequency,
                    "mean_activation": float(a.mean[slot]),
                }
            )
    return sorted(rows, key=lambda r: (r["score"], r["neuron_id"]))

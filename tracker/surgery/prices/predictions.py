"""Recommendations told what they would cost: what consumers lose once the others take over, from the same analysis.

Only of units whose removal is exact in structure, and whose consumers were seen to read enough: a dimension of a
residual stream that the others explain still leaves the norms that run over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tracker.compensation import explained_share, explained_units
from tracker.observation.records import Observation
from tracker.structure import UnitGroup
from tracker.surgery.prices.removal_problem import Limits, Problem, problems_of
from tracker.surgery.prices.saturation import expansion, gain, saturation
from tracker.tracker import ActivationTracker

WIDEST = 2048  # columns: wider groups would take seconds
ENOUGH = 2  # observations for each column

Neuron = tuple[str, int]


def add_predictions(tracker: ActivationTracker, seen: Observation, advice: dict[str, Any]) -> None:
    """Add to `advice`, in place, what it is predicted to change, and units that the others explain exactly.

    Nothing is added where no correlation was observed, or the structure cannot be traced.
    """
    if not tracker.current.reads and all(layer.covariance is None for layer in seen.layers):
        return
    try:
        groups, problems, _ = problems_of(tracker, Limits(), example=False)
    except Exception as error:  # the rest of the advice does without
        advice["metadata"]["notes"].append(f"what removal would change is not predicted: {error}")
        return
    gone = {(c["layer_name"], c["local_index"]): c for c in advice["prune"]}
    folded = {(c["layer_name"], c["local_indices"][1]): c for c in advice["merge"]}
    touched = {(c["layer_name"], i) for c in advice["merge"] for i in c["local_indices"]}
    found: list[dict[str, Any]] = []
    layers = {layer.name: layer for layer in seen.layers}
    threshold = advice["metadata"]["thresholds"]["saturation"]
    judged, full = set[str](), dict[str, dict[str, Any]]()
    for i, group in enumerate(groups):
        if problems.columns(i) > WIDEST:
            continue
        problem = problems.plain(i)  # what is told is a share of what the consumers compute
        finite = problem.covariance.isfinite().all() and problem.weight.isfinite().all()
        if problem.count < ENOUGH * len(problem.covariance) or not finite:
            continue
        neurons = [group.neurons(unit) for unit in range(group.size)]
        alone = _alone(problem, group.size)
        priced = problems[i] if alone is not None else problem
        in_loss = _alone(priced, group.size) if priced.priced else None
        if alone is not None:
            at = {neuron: unit for unit, mine in enumerate(neurons) for neuron in mine}
            for neuron in at.keys() & gone.keys():
                entry = gone[neuron]
                entry["predicted_output_change"] = _relative(float(alone[at[neuron]]), problem)
                if in_loss is not None and in_loss.isfinite().all():
                    entry["predicted_loss_change"] = float(in_loss[at[neuron]])
            for neuron in at.keys() & folded.keys():
                entry, unit = folded[neuron], at[neuron]
                keep = at.get((entry["layer_name"], entry["local_indices"][0]))
                if keep is not None:
                    lost = _folded(problem, keep, unit)
                    entry["predicted_output_change"] = _relative(lost, problem)
                    if in_loss is not None and in_loss.isfinite().all():
                        entry["predicted_loss_change"] = _folded(priced, keep, unit)
        judged |= set(group.layers)
        need = saturation(problem, group.size, threshold)
        if need is not None and (entry := expansion(group, layers, need, gain(problems[i]))):
            full[entry["layer_name"]] = entry
            if "predicted_gain" in entry:
                entry["predicted_loss_change"] = -entry["predicted_gain"]
            if (share := _mean_share(problem, group.size)) is not None:
                entry["mean_explained_share"] = share
        if touched.isdisjoint(n for mine in neurons for n in mine):
            explained = _explained(seen, group, problem, neurons, gone)
            if in_loss is not None:  # what the others make up for costs nothing
                explained = [{**entry, "predicted_loss_change": 0.0} for entry in explained]
            found += explained
    advice["prune"] += found
    losing = {c["layer_name"] for c in (*advice["prune"], *advice["merge"])}
    busy = [c for c in advice["expand"] if c["layer_name"] not in judged]
    most = sorted(full.values(), key=lambda c: -c.get("predicted_gain", 0.0))
    advice["expand"] = [c for c in (*most, *busy) if c["layer_name"] not in losing]
    advice["statistics"]["total_prunable_neurons"] = len(advice["prune"])
    advice["statistics"]["layers_needing_expansion"] = len(advice["expand"])


def _alone(problem: Problem, size: int) -> Tensor | None:
    """What goes missing of what the consumers compute if one unit alone goes: (units,); None for heads.

    The variance that the others leave of a column, 1/[C⁻¹]ⱼⱼ, times ‖wⱼ‖² (Hassibi & Stork, 1993). Of a priced
    problem it is the rise of the loss, to second order.
    """
    if any(len(columns) != problem.consumers for columns in problem.units[:size]):
        return None
    share = explained_share(problem.covariance, problem.mean).nan_to_num(1.0)
    left = problem.covariance.diagonal().clamp(min=0) * (1 - share)
    each = left * problem.weight.double().square().sum(0)
    return torch.stack([each[list(columns)].sum() for columns in problem.units[:size]])


def _folded(problem: Problem, keep: int, drop: int) -> float:
    """The same if one unit is folded into one other, by the best affine map of each column."""
    c, w, lost = problem.covariance, problem.weight.double(), 0.0
    for k, d in zip(problem.units[keep], problem.units[drop], strict=True):
        left = c[d, d] - c[k, d].square() / c[k, k].clamp(min=1e-300)
        lost += float(left.clamp(min=0) * w[:, d].square().sum())
    return lost


def _relative(lost: float, problem: Problem) -> float:
    """Root mean square of what goes missing, as a share of what the consumers compute."""
    return float(min(1.0, (max(lost, 0.0) / problem.total) ** 0.5))


def _mean_share(problem: Problem, size: int) -> float | None:
    share = explained_share(problem.covariance, problem.mean)
    mean = share[[c for columns in problem.units[:size] for c in columns]].nanmean()
    return None if bool(mean.isnan()) else float(mean)


def _explained(
    seen: Observation,
    group: UnitGroup,
    problem: Problem,
    neurons: list[tuple[Neuron, ...]],
    gone: Mapping[Neuron, Any],
) -> list[dict[str, Any]]:
    """Entries for units that those explain exactly which are to stay."""
    stays = [u for u in range(group.size) if not any(n in gone for n in neurons[u])]
    rest = problem.units[group.size :]
    units = [*(problem.units[u] for u in stays), *rest]
    kept = [c for columns in units for c in columns]
    at = {c: i for i, c in enumerate(kept)}
    index = torch.tensor(kept, dtype=torch.int64)
    exact = explained_units(
        problem.covariance[index[:, None], index],
        problem.weight[:, index],
        [[at[c] for c in columns] for columns in units],
        range(len(stays), len(units)),
        count=problem.count,
        mean=None if problem.mean is None else problem.mean[index],
    )
    layers = {layer.name: layer for layer in seen.layers}
    entries: list[dict[str, Any]] = []
    for unit in [stays[u] for u in exact][: len(stays) - 1]:  # one stays in any case
        made = [n for n in neurons[unit] if n[0] in group.layers and n[0] in layers]
        if len(made) != 1 or layers[made[0][0]].is_output:
            continue
        (name, slot), a = made[0], layers[made[0][0]].activity
        entries.append(
            {
                "neuron_id": layers[name].ids[slot],
                "layer_name": name,
                "local_index": slot,
                "reason": "explained_by_others",
                "firing_frequency": float(a.firing_frequency[slot]),
                "mean_activation": float(a.mean[slot]),
                "std_deviation": float(a.variance[slot].sqrt()),
                "predicted_output_change": 0.0,
            }
        )
    return entries

"""How full a layer is for its consumers, and what growth would gain: where they need almost all of its units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracker.analysis.recommendations import GROWTH
from tracker.observation.records import LayerObservation
from tracker.structure import UnitGroup
from tracker.surgery.prices.removal_problem import Problem

SPARED = 1e-3  # relative squared error of the consumers up to which units are spare: a policy's default tolerance


def saturation(problem: Problem, size: int, threshold: float) -> float | None:
    """The share of a group's units that its consumers need, if it is `threshold` or more.

    Units are spare as long as the consumers, refitted by least squares on those that stay, err by less than SPARED of
    what they compute. Only as many are tried as the threshold asks for.
    """
    tried = min(int((1 - threshold) * size + 1e-9) + 1, size - 1)
    selection = problem.backward(tried) if tried > 0 else None
    errors = [] if selection is None else (selection.errors / problem.total).tolist()
    share = 1 - sum(error <= SPARED for error in errors) / size
    return share if share >= threshold else None


def gain(priced: Problem) -> float | None:
    """What the loss is predicted to rise by without the unit that matters least: about what one more could gain.

    A unit that comes matters less than those that are there, as each next one does. None where no gradients were taken.
    """
    if not priced.priced:
        return None
    errors = priced.backward(1).errors
    return float(errors[0]) if len(errors) else None


def expansion(
    group: UnitGroup, layers: Mapping[str, LayerObservation], share: float, worth: float | None
) -> dict[str, Any] | None:
    """The advice to expand a group by one of its layers; None where none of them was observed, or is the output."""
    if any(layers[name].is_output for name in group.layers if name in layers):
        return None
    made = [name for name, _ in group.neurons(0) if name in group.layers and name in layers]
    if not made:
        return None
    name, own = made[0], made.count(made[0])
    activity = layers[name].activity
    seen = activity.firing_frequency[activity.batches > 0]
    entry: dict[str, Any] = {
        "layer_name": name,
        "current_size": len(layers[name].ids),
        "suggested_expansion": max(1, round(GROWTH * group.size)) * own,
        "avg_activity": float(seen.mean()) if len(seen) else 0.0,
        "reason": "high_saturation",
        "saturation": share,
        "basis": (
            f"what reads it needs {share:.1%} of its units: without more of them it would err by more than "
            f"{SPARED:.1%} of what it computes, whatever the others take over"
        ),
    }
    if worth is not None:
        entry["predicted_gain"] = worth
        entry["basis"] += f"; the loss would rise by {worth:.2g} without the least important one"
    return entry

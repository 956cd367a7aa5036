"""What the life of a network that changes itself consists of: decisions, each at a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By operation: what was done.
DONE = {
    "prune_units": "pruned",
    "merge_neurons": "merged",
    "expand_layer": "expanded",
    "recycle_neurons": "recycled",
    "insert_layer": "inserted",
    "remove_layer": "dropped",
    "compress": "compressed",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """One entry of a network's life: what was decided at a step, and why.

    Attributes:
        step: Of the run, counted from 1; 0 is its beginning.
        what: "pruned", "merged", "expanded", "recycled", "inserted", "dropped", "kept", "undone" or "refused"; of a
            change that was made by hand also "compressed" or "changed".
        why: For people.
        loss: Mean since the last look.
        parameters: Of the model afterwards.
        widths: Neurons by layer, afterwards.

    Examples:
        >>> engine.start_self_modification()
        >>> decision = engine.life[0]
        >>> decision.step, decision.what, decision.parameters
        (0, 'kept', 115)
    """

    step: int
    # "pruned", "merged", "expanded", "recycled", "inserted", "dropped", "kept", "undone", "refused"
    what: str
    why: str
    loss: float
    parameters: int
    widths: dict[str, int]


def decision_of(data: Mapping[str, Any]) -> Decision:
    """The decision of plain data, as `dataclasses.asdict` made it.

    Raises:
        TypeError, ValueError: It is none.
    """
    kinds = {"step": int, "what": str, "why": str, "loss": float, "parameters": int, "widths": dict}
    if set(data) != set(kinds) or any(type(data[name]) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{str(data)[:80]} is no decision")
    if any(type(width) is not int for width in data["widths"].values()):
        raise ValueError("a width is a whole number")
    return Decision(**data)

"""What a change of a model did, or would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of one change.

    promise: "exact" (outputs unchanged), "masked" (equal to the model whose consumers see zero in the place of what
        went), or "changed" (a norm or softmax over the units, say, sees that they went).
    output_difference: Measured in float64 on the example inputs, relative to the largest output: from the masked model
        where the promise is "masked", else from the model as it was. None where verification was off.
    """

    operation: str
    promise: str
    output_difference: float | None
    units: dict[str, list[int]]
    removed_ids: list[int]
    added_ids: list[int]
    parameters_before: int
    parameters_after: int
    flops_before: int  # of one forward pass of the example inputs
    flops_after: int
    notes: list[str] = field(default_factory=list)  # what else a user should know
    skipped: list[str] = field(default_factory=list)  # asked and not done, with reasons
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """For people."""
        parts = [f"{len(u)} of {g}" for g, u in self.units.items()]
        if self.removed_ids:
            parts.append(f"{len(self.removed_ids)} neurons gone")
        if self.added_ids:
            parts.append(f"{len(self.added_ids)} neurons new")
        did = "would be" if self.dry_run else "done"
        difference = self.output_difference
        measured = "not measured" if difference is None else f"{difference:.1e}"
        lines = [
            f"{self.operation} ({did}): {', '.join(parts) or 'no neurons'}",
            f"  parameters {self.parameters_before:,} -> {self.parameters_after:,}, "
            f"FLOPs {self.flops_before:,} -> {self.flops_after:,}",
            f"  promise: {self.promise}, difference from it: {measured}",
        ]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  skipped: {reason}" for reason in self.skipped]
        return "\n".join(lines)

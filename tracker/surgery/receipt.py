"""What a change of a model did, or would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of one change.

    promise: "exact" (outputs unchanged), "masked" (equal to the model whose consumers see zero in the place of what
        went), or "changed" (a norm or softmax over the units, say, sees that they went).
    output_difference: Measured in float64 on the example inputs, relative to the largest output: from the masked model
        where the promise is "masked", else from the model as it was. None where verification was off.
    predicted_loss_change: What the loss is predicted to rise by, from gradients that `calibrate` took; None without.
    loss: Which loss `compress` measured; None where nothing was. loss_before, loss_after: On the same batches.
    candidates: Ways to spend the budget that it tried on copies, and the loss after each.
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
    predicted_loss_change: float | None = None
    loss: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    candidates: dict[str, float] = field(default_factory=dict)

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
        if self.predicted_loss_change is not None:
            lines.append(f"  predicted change of the loss: {self.predicted_loss_change:+.3g}")
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"  {self.loss}: {self.loss_before:.5g} -> {self.loss_after:.5g}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  skipped: {reason}" for reason in self.skipped]
        return "\n".join(lines)


def taken_back(receipt: Receipt) -> Receipt:
    """The receipt of taking a change back, without ids: those are the engine's that asks."""
    return Receipt(
        operation="undo",
        promise="exact" if receipt.promise == "exact" else "changed",
        output_difference=None,
        units=dict(receipt.units),
        removed_ids=[],
        added_ids=[],
        parameters_before=receipt.parameters_after,
        parameters_after=receipt.parameters_before,
        flops_before=receipt.flops_after,
        flops_after=receipt.flops_before,
        notes=[f"{receipt.operation} was taken back, bit for bit"],
    )


def joined(
    operation: str,
    receipts: Sequence[Receipt],
    difference: float | None,
    skipped: Sequence[str],
    *,
    dry_run: bool,
) -> Receipt:
    """One receipt of several changes in a row; `difference` is of all of them together."""
    promises = {r.promise for r in receipts}
    first, last = receipts[0], receipts[-1]
    added = [i for r in receipts for i in r.added_ids]
    removed = [i for r in receipts for i in r.removed_ids]
    units: dict[str, list[int]] = {}
    for receipt in receipts:
        for group, gone in receipt.units.items():
            units.setdefault(group, []).extend(gone)
    return Receipt(
        operation=operation,
        promise="exact" if promises == {"exact"} else "changed",
        output_difference=difference,
        units=units,
        removed_ids=sorted(removed),
        added_ids=sorted(added),
        parameters_before=first.parameters_before,
        parameters_after=last.parameters_after,
        flops_before=first.flops_before,
        flops_after=last.flops_after,
        notes=list(dict.fromkeys(note for r in receipts for note in r.notes)),
        skipped=list(skipped),
        dry_run=dry_run,
        predicted_loss_change=_sum([r.predicted_loss_change for r in receipts]),
        loss=last.loss,
        loss_before=first.loss_before,
        loss_after=last.loss_after,
        candidates=last.candidates,
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None

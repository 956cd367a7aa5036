"""What a change of a model did, or would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tracker.surgery.loss_change import LossForecast
from tracker.utils.notebook import as_html
from tracker.utils.text import fitting


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of one change.

    Attributes:
        operation: Name of the call.
        promise: "exact" (outputs unchanged), "masked" (equal to the model whose consumers see zero in the place of what
            went), or "changed" (a norm or softmax over the units, say, sees that they went).
        output_difference: Measured in float64 on the example inputs, relative to the largest output: from the masked
            model where the promise is "masked", else from the model as it was. None where verification was off.
        units: Group name → units that went.
        removed_ids: Of neurons that went.
        added_ids: Of neurons that came.
        parameters_before: Of the model.
        parameters_after: Of the model.
        flops_before: Of one forward pass of the example inputs.
        flops_after: The same afterwards.
        notes: What else a user should know.
        skipped: What was asked and not done, with reasons.
        dry_run: Whether nothing was touched.
        predicted_loss_change: What the loss is predicted to rise by, from gradients that `calibrate` took; None
            without.
        loss: Which loss `compress` measured; None where nothing was.
        loss_before: On held-back batches, before the change.
        loss_after: On the same batches, after it.
        candidates: Ways to spend the budget that it tried on copies, and the loss after each.
        kinds: By group of `units`, what its units are: "neuron", "channel", "head", ... (see `UnitGroup.kind`).
        widths: Of layers that became wider or narrower, neurons [before, after]; norms are left out.
        modules: Names of layers and blocks that were inserted, or in whose place something else stands now.
        samples: In the example inputs, of whose forward pass the FLOPs are; None where unknown.

    Examples:
        >>> receipt = engine.prune_neurons({"0": [1]}, dry_run=True)
        >>> print(receipt)  # doctest: +ELLIPSIS
        prune_units (would be): 1 neuron gone
        ...
        >>> receipt.parameters_before - receipt.parameters_after, receipt.removed_ids
        (11, [1])
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
    kinds: dict[str, str] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        """For people."""
        did = "would be" if self.dry_run else "done"
        difference = self.output_difference
        measured = "not measured" if difference is None else f"{difference:.1e}"
        each, of = (self.samples, " of one sample") if self.samples else (1, "")
        lines = [f"{self.operation} ({did}): {', '.join(_parts(self)) or 'no neurons'}"]
        if self.widths:
            widths = [f"{n} {a:,} -> {b:,}" for n, (a, b) in self.widths.items()]
            lines.append(f"  neurons of {_some(widths)}")
        lines += [
            f"  parameters {self.parameters_before:,} -> {self.parameters_after:,}, "
            f"FLOPs{of} {self.flops_before / each:,.0f} -> {self.flops_after / each:,.0f}",
        ]
        if self.operation != "undo":
            lines.append(f"  promise: {self.promise}, difference from it: {measured}")
        if self.predicted_loss_change is not None:
            lines.append(f"  predicted change of the loss: {self.predicted_loss_change:+.3g}")
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"  {self.loss}: {self.loss_before:.5g} -> {self.loss_after:.5g}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  skipped: {reason}" for reason in self.skipped]
        return "\n".join(map(fitting, lines))


def _parts(receipt: Receipt) -> list[str]:
    """What went and what came: units by their kinds, and neurons where these are not the same."""
    counts = Counter[str]()
    for group, units in receipt.units.items():
        counts[receipt.kinds.get(group, "unit")] += len(units)
    back = receipt.operation == "undo"
    parts, gone, new = list(receipt.modules), len(receipt.removed_ids), len(receipt.added_ids)
    if receipt.dry_run and not receipt.units:  # new ones have no ids yet
        new = new or sum(max(after - before, 0) for before, after in receipt.widths.values())
    if counts:
        parts += [f"{n:,} {_WORDS.get(k, (k, k))[n != 1]}" for k, n in counts.items()]
        parts[-1] += " back" if back else " gone"
        plain, neurons = {"neuron", "channel", "unit"}, new if back else gone
        if neurons and (neurons != sum(counts.values()) or not counts.keys() <= plain):
            rest = "with those of norms and shortcuts" if counts.keys() <= plain else "in all"
            parts.append(f"{neurons:,} neurons {rest}")
        gone, new = (gone, 0) if back else (0, new)
    if gone:
        parts.append(f"{gone:,} neuron{'s' * (gone > 1)} gone")
    if new:
        parts.append(f"{new:,} neuron{'s' * (new > 1)} {'back' if back else 'new'}")
    return parts


_WORDS = {
    "neuron": ("neuron", "neurons"),
    "channel": ("channel", "channels"),
    "head": ("head", "heads"),
    "head_dim": ("dimension of heads", "dimensions of heads"),
    "group": ("group of channels", "groups of channels"),
    "hidden": ("hidden unit", "hidden units"),
    "residual": ("dimension of the residual stream", "dimensions of the residual stream"),
    "embedding": ("dimension of embeddings", "dimensions of embeddings"),
    "unit": ("unit", "units"),
}


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:6]) + (f", and {len(texts) - 6} layers more" if len(texts) > 6 else "")


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
        kinds=dict(receipt.kinds),
        widths={name: [after, before] for name, (before, after) in receipt.widths.items()},
        modules=list(receipt.modules),
        samples=receipt.samples,
    )


def merge_receipts(
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
    widths: dict[str, list[int]] = {}
    for receipt in receipts:
        for name, (before, after) in receipt.widths.items():
            widths[name] = [widths.get(name, [before])[0], after]
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
        candidates=last.candidates,
        kinds={group: kind for r in receipts for group, kind in r.kinds.items()},
        widths={name: pair for name, pair in widths.items() if pair[0] != pair[1]},
        modules=list(dict.fromkeys(name for r in receipts for name in r.modules)),
        samples=first.samples,
    )


def with_loss(receipt: Receipt, measured: LossForecast, notes: Sequence[str]) -> Receipt:
    """The same receipt with the loss that was measured before and after the change, and notes that say on what."""
    return replace(
        receipt,
        loss=measured.loss,
        loss_before=measured.loss_before,
        loss_after=measured.loss_after,
        notes=list(dict.fromkeys([*receipt.notes, *notes])),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None

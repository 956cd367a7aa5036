"""Plans of depth: what to insert behind a layer, and how a layer or a block goes."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.errors import SurgeryError
from tracker.inputs.calls import Arguments
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery.inserted_modules import INSERTED, block_for, can_follow
from tracker.surgery.operations.block_copies import block_copy, counted, is_block
from tracker.surgery.operations.bypass import Removal, removal_of
from tracker.surgery.plan import Plan
from tracker.tracker import ActivationTracker

# A removal is refused that explains less of what the removed part did.
EXPLAINED = 0.1


def plan_insertion(tracker: ActivationTracker, after: str) -> Plan:
    """The plan that puts a layer behind the layer `after`, or a copy of it behind a block; the function stays.

    Raises:
        SurgeryError: It is no linear or convolutional layer and no residual block, or has one behind it already.
    """
    entry = tracker.current
    model = entry.model()
    assert entry.observer.inputs is not None
    inputs, attributes = Arguments(*entry.observer.inputs), {}
    module = dict(model.named_modules()).get(after)
    if module is None or can_follow(module) or INSERTED in module._modules or not is_block(module):
        block = block_for(model, inputs, after)
    else:
        with entry.observer.paused():
            block = block_copy(model, inputs, after)
        attributes = counted(model, block)
    return Plan(
        (),
        {},
        {},
        (),
        {n: t.shape for n, t in tensors(model).items()},
        operation="insert_layer",
        promise="exact",
        attributes=attributes,
        modules={f"{after}.{INSERTED}": block},
    )


def plan_layer_removal(
    tracker: ActivationTracker, name: str, batches: Sequence[Arguments], force: bool
) -> tuple[Plan, list[str]]:
    """The plan that removes a layer of a chain, or a residual block, and refits what is left.

    Raises:
        SurgeryError: It is neither, or the rest explains too little of what it did.
    """
    entry = tracker.current
    model, structure = entry.model(), tracker.structure()
    readers = dict.fromkeys(
        tensor.rpartition(".")[0]
        for group in structure.groups
        if name in group.layers
        for (tensor, _), role in group.roles.items()
        if role == "reads"
    )
    removal = removal_of(model, name, list(readers), batches)
    if not (removal.explained >= EXPLAINED or force):
        raise SurgeryError(
            f"Without {name!r}, what is left explains only {max(removal.explained, 0):.0%} of what it did"
            f"{_judged(removal)}. Pass force=True to remove it nevertheless."
        )
    plan = Plan(
        (),
        removal.slots,
        {},
        (),
        {n: t.shape for n, t in tensors(model).items()},
        operation="remove_layer",
        promise="changed",
        fresh=removal.added,
        modules={name: removal.instead},
    )
    return plan, _told(name, removal)


def _told(name: str, removal: Removal) -> list[str]:
    """What the receipt says of a removal."""
    bypass = removal.instead
    what = "what is left explains"
    if removal.added:
        what = "the refit explains"
    elif bypass.scale and (bypass.scale, bypass.shift) != (1, 0):
        what = (
            f"{bypass.scale:.4g} · its input {bypass.shift:+.4g} stands in its place and explains"
        )
    notes = [f"{what} {removal.explained:.1%} of what {name} did{_judged(removal)}"]
    if removal.few:
        few = ", ".join(removal.few[:4])
        notes.append(f"refitted from few observations ({few}): pass batches=")
    return notes


def _judged(removal: Removal) -> str:
    if not removal.total:
        return ""
    if not removal.judged_on:
        return ", on the rows that it was fitted to"
    return f", on {removal.judged_on:,} rows that the fit did not see"

"""Growth: fresh units that the consumers do not notice, and a new start for units that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tracker.errors import StructureError, SurgeryError
from tracker.inputs.batches import Batch
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import is_linear, kind_of, layer_of, made_along
from tracker.structure import Structure, UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.code_sizes.size_equations import UnsolvableError
from tracker.structure.code_sizes.traced_int import Attribute
from tracker.structure.trials.temporary_copies import copy_sharing_storage
from tracker.surgery.apply import apply
from tracker.surgery.calibration.growth_directions import directions_of
from tracker.surgery.calibration.loss import Objective
from tracker.surgery.operations.compensate import compute_compensation
from tracker.surgery.plan import Plan, plan_removal
from tracker.tracker import ActivationTracker
from tracker.utils.nested import tensors_in
from tracker.utils.slotmap import SlotMap

MOST = 2**20  # new neurons at once: more are a slip, and would fill the memory


def plan_expansion(
    tracker: ActivationTracker,
    layer: str,
    count: int,
    directions: Tensor | None = None,
    seed: int = 0,
    group: UnitGroup | None = None,
) -> Plan:
    """The plan that adds `count` neurons to a layer: read with zero weights, made from random or given directions.

    Args:
        tracker: Its current model is the one to grow.
        layer: A layer that makes the units.
        count: Neurons; a multiple of those of the layer that one unit comprises.
        directions: (≥ 1, incoming features) for the first of the new neurons, best first; random beyond.
        seed: Of the random directions.
        group: That grows; else the one that the layer makes, of heads and their dimensions the heads.

    Raises:
        SurgeryError: The layer makes no units that can be added one by one; the message says why.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SurgeryError(f"A layer is expanded by 1 neuron or more, not by {count!r}.")
    if count > MOST:
        raise SurgeryError(f"A layer is expanded by {MOST:,} neurons at most, not by {count:,}.")
    entry = tracker.current
    model = entry.model()
    group = group or _growing(model, tracker.structure(), layer)
    template = group.size - 1
    own = [i for name, i in group.neurons(template) if name == layer]
    units, rest = divmod(count, len(own))
    if rest:
        raise SurgeryError(
            f"Layer {layer!r} grows by units of {len(own)} neurons (group {group.name!r}): {count} is no multiple."
        )
    held = tensors(model)
    slots: dict[str, dict[int, SlotMap]] = {}
    for (name, dim), indices in group.members[template].items():
        slots.setdefault(name, {})[dim] = appended(held[name].shape[dim], indices, units)
    layers: dict[str, list[int]] = {}
    for name, index in group.neurons(template):
        layers.setdefault(name, []).append(index)
    plan = Plan(
        (),
        slots,
        {
            name: appended(len(entry.layers[name].ids), indices, units)
            for name, indices in layers.items()
            if name in entry.layers
        },
        (),
        {n: t.shape for n, t in held.items()},
        operation="expand_layer",
        promise="exact",
        attributes=_grown_integers(tracker.structure(), group, units),
    )
    fresh = fresh_values(
        model, group, slots, seed, {f"{layer}.{_weight_key(model, layer)}": directions}
    )
    return with_measured_norms(tracker, replace(plan, fresh=fresh, made=_made(group)))


def plan_recycling(
    tracker: ActivationTracker, units: Mapping[str, Sequence[int]], seed: int = 0
) -> tuple[Plan, list[str]]:
    """The plan that gives units a new start in their places, their consumers taking over what they did."""
    entry = tracker.current
    model, structure = entry.model(), tracker.structure()
    sizes = {name: len(layer.ids) for name, layer in entry.layers.items()}
    plan = plan_removal(model, structure, units, sizes)
    takeover = compute_compensation(tracker, plan)
    held = tensors(model)
    slots = {
        name: {d: _in_place(held[name].shape[d], kept) for d, kept in dims.items()}
        for name, dims in plan.tensors.items()
    }
    layers = {name: _in_place(sizes[name], kept) for name, kept in plan.layers.items()}
    fresh: dict[str, Tensor] = {}
    for group, _ in plan.choice:
        fresh.update(fresh_values(model, group, slots, seed, {}))
    renewed = replace(
        plan,
        operation="recycle_neurons",
        attributes={},  # all sizes stay
        tensors=slots,
        layers=layers,
        mixes=takeover.mixes,
        gains=takeover.gains,
        fresh=fresh,
        promise="exact" if takeover.exact else "changed",
    )
    return with_measured_norms(tracker, renewed), takeover.notes


def fresh_values(
    model: nn.Module,
    group: UnitGroup,
    slots: Mapping[str, Mapping[int, SlotMap]],
    seed: int,
    given: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """Content of the fresh slots.

    Where units are made, random directions of the norm that the others have; where they are read, zero; for what acts
    on them on their way, the others' mean.
    """
    if not -(2**63) <= seed < 2**64:
        raise SurgeryError(f"A seed is a whole number of 64 bits, not {seed!r}.")
    generator = torch.Generator().manual_seed(seed)
    held = tensors(model)
    values: dict[str, Tensor] = {}
    for (name, dim), role in group.roles.items():
        if role == "reads" or not held[name].is_floating_point():
            continue
        old = held[name].detach().double().cpu()
        new = _moved(old, slots[name])
        at = [i for i, s in enumerate(slots[name][dim].source) if s is None]
        if old.ndim == 1:
            # A fresh bias is zero. A norm's scale and shift are what the others' are.
            content = torch.zeros(len(at)).double()
            if role == "carries":
                content += old.mean()
        else:
            rows = old.movedim(dim, 0).flatten(1)
            shape = new.movedim(dim, 0)[at].shape
            content = torch.randn(shape, generator=generator, dtype=torch.float64)
            chosen = given.get(name)
            flat = content.flatten(1)
            if chosen is not None:
                if chosen.shape[1:] != flat.shape[1:]:
                    raise SurgeryError(
                        f"Directions for {name} are of the shape (any, {flat.shape[1]}), not {tuple(chosen.shape)}."
                    )
                best = min(len(chosen), len(at))
                flat[:best] = chosen[:best].double().cpu()
            # Along other dimensions that grow as well there is nothing to read yet.
            live = rows.norm(dim=1)
            norm = live[live > 0].mean() if bool((live > 0).any()) else live.new_tensor(1.0)
            content = (flat / flat.norm(dim=1, keepdim=True) * norm).view(shape)
        target = values.setdefault(name, torch.zeros_like(new))
        target.movedim(dim, 0)[at] += content
    for (name, dim), role in group.roles.items():
        if role == "reads" and name in values:  # recurrent: made and read by the same matrix
            at = [i for i, s in enumerate(slots[name][dim].source) if s is None]
            values[name].movedim(dim, 0)[at] = 0
    return values


def _made(group: UnitGroup) -> dict[str, frozenset[int]]:
    """Dimensions of tensors along which units are made or pass, and not read."""
    found: dict[str, frozenset[int]] = {}
    for (name, dim), role in group.roles.items():
        if role != "reads":
            found[name] = found.get(name, frozenset()) | {dim}
    return found


def with_measured_norms(tracker: ActivationTracker, plan: Plan) -> Plan:
    """The plan with running statistics of fresh channels as the example inputs show them, norm by norm."""
    model, observer = tracker.current.model(), tracker.current.observer
    assert observer.inputs is not None
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and f"{name}.running_mean" in plan.fresh
    ]
    for name in norms:
        trial_copy = copy_sharing_storage(model)
        apply(plan, [trial_copy], [])
        seen: list[Tensor] = []
        trial_copy.get_submodule(name).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0].detach().double().cpu())
        )
        with observer.paused():
            forward_once(trial_copy, Arguments(*observer.inputs))
        if not seen:
            continue
        rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in seen])
        at = [i for i, s in enumerate(plan.tensors[f"{name}.running_mean"][0].source) if s is None]
        fresh = dict(plan.fresh)
        for key, value in (("running_mean", rows.mean(0)), ("running_var", rows.var(0))):
            content = torch.zeros_like(fresh[f"{name}.{key}"])
            content[at] = value[at]
            fresh[f"{name}.{key}"] = content
        plan = replace(plan, fresh=fresh)
    return plan


def gradient_directions(
    tracker: ActivationTracker, layer: str, batches: Iterable[Batch], objective: Objective
) -> Tensor | None:
    """Incoming directions of new neurons of a linear layer by which the loss falls fastest: (rank, features).

    Right singular vectors of E[δ xᵀ], δ the gradient at the outputs of the layer's consumers and x its own inputs:
    see `directions_of`.
    """
    model = tracker.current.model()
    group = _growing(model, tracker.structure(), layer)
    readers = {t.rpartition(".")[0] for (t, _), role in group.roles.items() if role == "reads"}
    trial_copy = copy_without_hooks(model)
    if not is_linear(trial_copy.get_submodule(layer)):
        return None
    inputs: list[Tensor] = []
    outputs: dict[str, list[Tensor]] = {name: [] for name in sorted(readers)}
    trial_copy.get_submodule(layer).register_forward_pre_hook(
        lambda m, a: inputs.append(a[0].detach())
    )
    for name, seen in outputs.items():
        trial_copy.get_submodule(name).register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(tensors_in(out)[0])
        )
    product: Tensor | None = None
    deltas: list[Tensor | None] = []
    for batch in batches:
        inputs.clear()
        for seen in outputs.values():
            seen.clear()
        # Inside the pass: afterwards the buffers are put back, and the graph would have saved others.
        sent = trial_copy.register_forward_hook(_sent_back(objective, batch, outputs, deltas))
        try:
            with tracker.current.observer.paused():
                forward_once(trial_copy, batch.call, torch.enable_grad(), given=batch.what)
        except StructureError as error:
            if isinstance(error.__cause__, SurgeryError):  # of the loss
                raise error.__cause__ from None
            raise
        sent.remove()
        x = inputs[0].flatten(0, -2).double() if inputs else None
        rows = [d.flatten(0, -2).double() for d in deltas if d is not None]
        if x is None or not rows or any(len(r) != len(x) for r in rows):
            return None
        step = torch.cat(rows, 1).T @ x
        product = step if product is None else product + step
    return None if product is None else directions_of(product)


def _sent_back(
    objective: Objective,
    batch: Batch,
    outputs: Mapping[str, list[Tensor]],
    deltas: list[Tensor | None],
) -> Callable[..., None]:
    """A hook of the whole model that sets `deltas` to the gradients of its loss at these outputs."""

    def hook(module: nn.Module, args: object, output: Any) -> None:
        assert objective.loss is not None
        objective.check(output, batch.given)
        made = [seen[0] for seen in outputs.values() if seen]
        value = objective.loss(output, batch.given)
        deltas[:] = torch.autograd.grad(value, made, allow_unused=True) if made else []

    return hook


def appended(size: int, template: Sequence[int], count: int) -> SlotMap:
    """`count` fresh copies of each run of the template's indices, right behind the run."""
    ends: dict[int, int] = {}
    run = 0
    chosen = sorted(template)
    for position, index in enumerate(chosen):
        run += 1
        if position + 1 == len(chosen) or chosen[position + 1] != index + 1:
            ends[index], run = run, 0
    source: list[int | None] = []
    for index in range(size):
        source.append(index)
        source += [None] * (count * ends.get(index, 0))
    return SlotMap(tuple(source))


def _grown_integers(structure: Structure, group: UnitGroup, count: int) -> Mapping[Attribute, int]:
    try:
        return structure.integers.solve_growth(group, group.size - 1, count)
    except UnsolvableError as error:
        raise SurgeryError(
            f"{count} units of {group.name!r} cannot be added, the model's code does not follow: {error}"
        ) from error


def _in_place(size: int, kept: SlotMap) -> SlotMap:
    stay = set(kept.known)
    return SlotMap(tuple(i if i in stay else None for i in range(size)))


def _moved(value: Tensor, slots: Mapping[int, SlotMap]) -> Tensor:
    for dim, change in slots.items():
        value = change.take(value, fill=0, dim=dim)
    return value


def _weight_key(model: nn.Module, layer: str) -> str:
    kind = kind_of(model.get_submodule(layer))
    return (kind.weight if kind is not None else None) or "weight"


def _growing(model: nn.Module, structure: Structure, layer: str) -> UnitGroup:
    """The group whose units a layer makes, where fresh ones can be added without a trace."""
    kind = kind_of(model.get_submodule(layer))
    if kind is not None and not kind.grows:
        raise SurgeryError(f"Layer {layer!r} cannot be expanded: layers of its kind do not grow.")
    made = [g for g in structure.groups if layer in g.layers]
    groups = [g for g in made if any(name == layer for name, _ in g.neurons(g.size - 1))]
    lonely = [g for g in groups if g.size == 1]
    ready = [g for g in groups if g.prunable and g.exact] or lonely
    # Of heads and their dimensions, heads: a new one is a whole.
    ready.sort(key=lambda g: -max(len(i) for i in g.members[0].values()))
    if ready and any(role == "reads" for role in ready[0].roles.values()):
        return ready[0]
    why = "no group of units is made by it: print(engine.structure) shows the groups"
    if made:
        why = f"the units of {made[0].name!r}, which it makes, are not counted as its neurons"
    for group in groups:
        why = group.reason or group.inexact_reason or "nothing that we know reads its units"
    for frozen in structure.frozen:
        if (
            not groups
            and layer_of(frozen.tensor) == layer
            and frozen.dim == made_along(model.get_submodule(layer))
        ):
            why = frozen.reason
    raise SurgeryError(f"Layer {layer!r} cannot be expanded: {why}.")

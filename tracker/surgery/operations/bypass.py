"""How a layer, a block, or a function of single features goes: what stands in its place, and what makes up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import StructureError, SurgeryError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import is_linear, kind_of
from tracker.modules.layers import known_width
from tracker.surgery.calibration.consumers import Consumer, consumer
from tracker.surgery.inserted_modules import Bypass, replace_module
from tracker.surgery.operations.data_flow import Flow, flow_of
from tracker.surgery.operations.least_squares import (
    first_input_and_output,
    fitted,
    held_back,
    precise,
    rows,
)
from tracker.surgery.undo import UndoLog
from tracker.utils.nested import tensors_in
from tracker.utils.slotmap import SlotMap


@dataclass(frozen=True, slots=True)
class Removal:
    """How a module can go.

    Attributes:
        instead: What stands in its place.
        slots, added: For tensors of what reads it, or of what writes before it.
        lost, total: What is left of what it did, and all of it, as sums of squares on `judged_on` rows.
        judged_on: Rows that the fit did not see; 0 where there were too few to hold some back.
        few: Layers that were refitted from fewer than two rows for each column.
    """

    instead: Bypass
    slots: Mapping[str, Mapping[int, SlotMap]]
    added: Mapping[str, Tensor]
    lost: float
    total: float
    judged_on: int = 0
    few: tuple[str, ...] = ()

    @property
    def explained(self) -> float:
        """Share of what the removed part did that is made up for; negative where the fit makes it worse."""
        return 1 - self.lost / self.total if self.total else 1.0


def removal_of(
    model: nn.Module, name: str, readers: Sequence[str], batches: Sequence[Arguments]
) -> Removal:
    """How the module `name` can be removed.

    A layer of a chain: its consumers (`readers`, linear) read what came before it, refitted by least squares. A
    residual block, or a branch whose sum stands outside of it: the last linear layer that writes into the stream before
    it takes over what it added. Any other module whose output has the shape of its input, as activations: what reads it
    is refitted where only linear layers do, or a multiple of its input plus a constant stands in its place; of both,
    what does better on rows that neither saw.

    Raises:
        SurgeryError: It is none of these.
    """
    module = dict(model.named_modules()).get(name)
    if module is None or not name:
        raise SurgeryError(f"There is no layer {name!r} to remove.")
    seen = first_input_and_output(model, batches, [name])[name]
    if not seen:
        raise SurgeryError(f"{name!r} was not called on the calibration data.")
    if len(seen) > len(batches):
        raise SurgeryError(f"{name!r} is called several times: it cannot be removed.")
    if known_width(module) is not None:
        return _chain(model, name, readers, batches)
    if seen[0][0].shape != seen[0][1].shape:
        raise SurgeryError(
            f"{name!r} turns {tuple(seen[0][0].shape)} into {tuple(seen[0][1].shape)}: only a block whose output "
            "has the shape of its input can be bypassed."
        )
    flow = flow_of(model, batches[0], name)
    returns = _returns(model, name, batches[0])
    has_layers = any(p.ndim > 1 for p in module.parameters())
    if has_layers and (flow.through or flow.is_branch):
        return _block(model, name, batches, seen, Bypass(returns, 1.0 if flow.through else 0.0))
    return _function(model, name, batches, seen, flow, returns)


def _chain(
    model: nn.Module, name: str, readers: Sequence[str], batches: Sequence[Arguments]
) -> Removal:
    if not readers or not all(is_linear(model.get_submodule(n)) for n in (name, *readers)):
        raise SurgeryError(
            f"{name!r} is no linear layer that only linear layers read, nor a block with a residual connection: it "
            "cannot be removed."
        )
    before = first_input_and_output(model, batches, readers)
    return _refit(model, name, Bypass(), _readers(model, readers), before, batches)


def _function(
    model: nn.Module,
    name: str,
    batches: Sequence[Arguments],
    seen: Sequence[tuple[Tensor, Tensor]],
    flow: Flow,
    returns: str,
) -> Removal:
    """An activation, say: its readers are refitted, or the best multiple and constant stand in its place."""
    inputs, outputs = rows([x for x, _ in seen]), rows([y for _, y in seen])
    if torch.equal(inputs, outputs):
        return Removal(Bypass(returns), {}, {}, 0.0, 0.0)
    held = held_back([y for _, y in seen])
    if flow.is_read:
        with suppress(SurgeryError):  # then it is judged by what they compute
            able = _readers(model, flow.readers)
            before = first_input_and_output(model, batches, flow.readers)
            multiple = _multiple(inputs, outputs, held, returns)[0]
            found = [
                _refit(model, name, Bypass(returns), able, before, batches),
                _refit(model, name, multiple, able, before, batches, keep=True),
            ]
            return min(found, key=lambda removal: removal.lost)
    multiple, lost = _multiple(inputs, outputs, held, returns)
    asked = held if bool(held.any()) else ~held
    total = float((outputs[asked] - outputs[~held].mean(0)).square().sum())
    return Removal(multiple, {}, {}, lost, total, int(held.sum()))


def _multiple(x: Tensor, y: Tensor, held: Tensor, returns: str) -> tuple[Bypass, float]:
    """One multiple and one constant for all features, and the squares that they leave on the rows held back."""
    wide = held.repeat_interleave(x.shape[1])
    fit = fitted(x.reshape(-1, 1), y.reshape(-1, 1), wide, centred=True)
    return Bypass(returns, float(fit.matrix), float(fit.offset)), fit.lost


def _readers(model: nn.Module, names: Sequence[str]) -> list[Consumer]:
    """Linear layers as consumers that can be refitted.

    Raises:
        SurgeryError: One cannot, its weight being tied or computed.
    """
    found = []
    for name in names:
        one = consumer(model, _read_of(model, name))
        if not isinstance(one, Consumer):
            raise SurgeryError(f"What reads it cannot be refitted: {one}.")
        found.append(one)
    return found


def _refit(
    model: nn.Module,
    name: str,
    instead: Bypass,
    readers: Sequence[Consumer],
    before: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    batches: Sequence[Arguments],
    *,
    keep: bool = False,
) -> Removal:
    """What `readers` compute of what reaches them with `instead` in the place of `name`; `keep`: with their weights."""
    inside = [one.module for one in readers if one.module.startswith(f"{name}.")]
    if inside:
        raise SurgeryError(
            f"{inside[0]!r}, which was inserted behind {name!r}, reads it and would go with it. Remove that one first."
        )
    trial_copy = copy_without_hooks(model)
    replace_module(trial_copy, name, instead, [], UndoLog())
    probe = _InputsOnly(trial_copy, [one.module for one in readers])
    for batch in batches:
        probe.run(batch)
    slots: dict[str, Mapping[int, SlotMap]] = {}
    added: dict[str, Tensor] = {}
    lost, total, judged_on, few = 0.0, 0.0, 0, []
    for one in readers:
        reader, given = one.module, probe.inputs[one.module]
        if len(given) != len(before[reader]):
            raise SurgeryError(
                f"Without {name!r}, {reader!r} is not reached: what stands between does not take tensors as they are "
                f"before {name!r}."
            )
        old, new = rows([x for x, _ in before[reader]]), rows(given)
        if len(old) != len(new):
            raise SurgeryError(f"Without {name!r}, {reader!r} reads tensors of another shape.")
        weight = model.get_parameter(one.weight).detach().double().cpu()
        matrix = weight if one.reads == 0 else weight.T
        target, held = old @ matrix, held_back(given)
        if keep:
            asked = held if bool(held.any()) else ~held
            lost += float((target - new @ matrix)[asked].square().sum())
            total += float((target[asked] - target[~held].mean(0)).square().sum())
            judged_on = max(judged_on, int(held.sum()))
            continue
        fit = fitted(new, target, held, centred=one.bias is not None)
        lost, total, judged_on = lost + fit.lost, total + fit.total, max(judged_on, fit.judged_on)
        few += [reader] if fit.few else []
        slots[one.weight] = {one.reads: SlotMap((None,) * new.shape[1])}
        added[one.weight] = fit.matrix if one.reads == 0 else fit.matrix.T
        if one.bias is not None:
            added[one.bias] = fit.offset
    return Removal(instead, slots, added, lost, total, judged_on, tuple(few))


def _block(
    model: nn.Module,
    name: str,
    batches: Sequence[Arguments],
    seen: Sequence[tuple[Tensor, Tensor]],
    instead: Bypass,
) -> Removal:
    into, made = rows([x for x, _ in seen]), rows([y for _, y in seen])
    did = made - into * instead.scale
    held = held_back([y for _, y in seen])
    writer = _writer(model, name, batches[0], seen[0][0].shape)
    if writer is None:
        nothing = float((did - did.mean(0)).square().sum())
        return Removal(instead, {}, {}, nothing, nothing)
    read = first_input_and_output(model, batches, [writer.module])[writer.module]
    hidden = rows([x for x, _ in read])
    fit = fitted(hidden, did, held, centred=writer.bias is not None)
    added = {writer.weight: fit.matrix if writer.reads == 0 else fit.matrix.T}
    if writer.bias is not None:
        added[writer.bias] = fit.offset
    few = (writer.module,) if fit.few else ()
    return Removal(instead, {}, added, fit.lost, fit.total, fit.judged_on, few)


def _read_of(model: nn.Module, name: str) -> tuple[str, int]:
    """The weight of a linear layer, and the dimension along which it reads."""
    module = model.get_submodule(name)
    kind = kind_of(module)
    if kind is None or kind.reads is None:
        return f"{name}.weight", 1
    return f"{name}.{kind.weight}", kind.reads(module)


def _writer(model: nn.Module, name: str, batch: Arguments, shape: torch.Size) -> Consumer | None:
    """The last linear layer before the block whose output is added into its input, as it is."""
    linears = {
        n: one
        for n, m in model.named_modules()
        if is_linear(m) and not n.startswith(name + ".")
        if isinstance(one := consumer(model, _read_of(model, n)), Consumer)
    }
    trial_copy = copy_without_hooks(model)
    order: list[str] = []
    entered: list[Tensor] = []
    trial_copy.get_submodule(name).register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(tensors_in((args, kwargs))[0]), with_kwargs=True
    )
    push = torch.randn(shape[-1], generator=torch.Generator().manual_seed(0))
    pushed = [""]  # the layer whose output is pushed
    for n in linears:

        def hook(module: nn.Module, args: Any, output: Any, n: str = n) -> Any:
            if not entered and isinstance(output, Tensor) and output.shape == shape:
                order.append(n)
            return output + push.to(output) if pushed[0] == n else None

        trial_copy.get_submodule(n).register_forward_hook(hook)
    forward_once(trial_copy, batch)
    base, first = entered[0].double(), list(order)
    for n in reversed(first):
        entered.clear()
        pushed[0] = n
        forward_once(trial_copy, batch)
        moved = entered[0].double() - base
        if float((moved - push.to(base)).abs().max()) < 1e-3 and first.count(n) == 1:
            return linears[n]
    return None


def _returns(model: nn.Module, name: str, batch: Arguments) -> str:
    trial_copy = copy_without_hooks(model)
    kinds: list[str] = []
    trial_copy.get_submodule(name).register_forward_hook(
        lambda m, a, out: kinds.append("tuple" if isinstance(out, tuple) else "tensor")
    )
    forward_once(trial_copy, batch)
    return kinds[0]


class _InputsOnly:
    """The inputs of some modules, of which the code behind may fail."""

    def __init__(self, trial_copy: nn.Module, names: Sequence[str]) -> None:
        self.trial_copy, self.inputs = trial_copy, {name: list[Tensor]() for name in names}
        for name in names:
            trial_copy.get_submodule(name).register_forward_pre_hook(
                lambda m, args, kwargs, name=name: self.inputs[name].append(
                    precise(tensors_in((args, kwargs))[0])
                ),
                with_kwargs=True,
            )

    def run(self, batch: Arguments) -> None:
        # The widths do not fit yet: what counts has been seen before that shows.
        with suppress(StructureError):
            forward_once(self.trial_copy, batch)

"""Depth: layers inserted without a trace, and layers removed, what reads them refitted to what is left.

Names stay: an inserted layer is a child of the layer behind which it stands, a removed one is left as a bypass. So
the keys of all other parameters, and everything that speaks of layers by name, stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.errors import StructureError, SurgeryError
from tracker.layers import known_width
from tracker.nested import tensors_in
from tracker.probe import Arguments, forward_once, quiet_copy
from tracker.slotmap import SlotMap
from tracker.surgery.undo import UndoLog

INSERTED = "inserted"


class ResidualBlock(nn.Module):
    """x + out(relu(into(x))), `out` zero at birth: the identity, until it learns otherwise."""

    def __init__(self, into: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.into, self.out = into, out
        nn.init.zeros_(out.weight)  # type: ignore[arg-type]
        nn.init.zeros_(out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: the output of the layer before."""
        return x + self.out(torch.relu(self.into(x)))


class ReluIdentity(nn.Module):
    """linear(relu(x)), `linear` the identity at birth: before a ReLU it changes nothing, since relu∘relu = relu."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        weight: Any = linear.weight
        with torch.no_grad():
            weight.zero_()
            index = torch.arange(weight.shape[0])
            weight[(index, index, *[0] * (weight.ndim - 2))] = 1.0
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: the output of the layer before."""
        return self.linear(torch.relu(x))


class Bypass(nn.Module):
    """What is left of a removed module: its first input goes through, or zero, where the sum stands outside of it.

    returns: "tensor" or "tuple", as the module did. passes: "input" or "zero".
    """

    def __init__(self, returns: str = "tensor", passes: str = "input") -> None:
        super().__init__()
        self.returns, self.passes = returns, passes

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        """x: the first input of the module that was here."""
        y = x if self.passes == "input" else torch.zeros_like(x)
        return (y,) if self.returns == "tuple" else y


def run_inserted(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook of a layer or block with an inserted one: the output goes through it.

    What stands behind a block is called as the block was, its output in the place of the first tensor.
    """
    inserted: Any = module._modules[INSERTED]
    if isinstance(module, nn.Linear | _ConvNd):
        return inserted(output)
    args, kwargs = again_with(args, kwargs, tensors_in(output)[0])
    return inserted(*args, **kwargs)


def again_with(args: Any, kwargs: Any, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block, `stream` in the place of the first tensor."""
    args, kwargs = list(args), dict(kwargs)
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            args[i] = stream
            return tuple(args), kwargs
    key = next(k for k, value in kwargs.items() if isinstance(value, Tensor))
    return tuple(args), {**kwargs, key: stream}


def block_for(model: nn.Module, inputs: Arguments, name: str) -> nn.Module:
    """A layer that can stand behind the layer `name` without changing the function.

    The identity where a ReLU is all that reads the layer, a residual block of zero output otherwise.

    Raises:
        SurgeryError: There is no such layer, or it is not linear or convolutional.
    """
    modules = dict(model.named_modules())
    layer: Any = modules.get(name)
    if layer is None:
        raise SurgeryError(f"There is no layer {name!r} to insert another one after.")
    if INSERTED in layer._modules:
        raise SurgeryError(f"Behind {name!r} a layer was inserted before: insert after that one.")
    width = known_width(layer)
    if width is None or not isinstance(layer, nn.Linear | _ConvNd):
        raise SurgeryError(
            f"A layer can be inserted after a linear or a convolutional one; {name!r} is a {type(layer).__name__}."
        )
    n = width[0]
    weight: Tensor = layer.weight
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}

    def linear() -> nn.Module:
        if isinstance(layer, nn.Linear):
            return nn.Linear(n, n, **options)
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        return kinds[len(layer.kernel_size)](n, n, 1, **options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if read_by(model, inputs, name) <= {"relu", "relu_"}:
            return ReluIdentity(linear()).train(layer.training)
        return ResidualBlock(linear(), linear()).train(layer.training)


def can_follow(layer: nn.Module) -> bool:
    """Whether another layer can be inserted behind this one."""
    return isinstance(layer, nn.Linear | _ConvNd) and INSERTED not in layer._modules


def inserted_layers(model: nn.Module) -> int:
    """Layers that were inserted so far, with those that were removed again."""
    return sum(name.rpartition(".")[2] == INSERTED for name, _ in model.named_modules())


def read_by(model: nn.Module, inputs: Arguments, name: str) -> set[str]:
    """Names of the operations that take the output of a layer."""
    bench = quiet_copy(model)
    reader = _Readers()

    def watch(module: nn.Module, args: object, output: object) -> None:
        reader.watched = [*reader.watched, *tensors_in(output)]

    bench.get_submodule(name).register_forward_hook(watch)
    output = forward_once(bench, inputs, within=reader)
    returned = {id(t) for t in tensors_in(output)}
    if any(id(t) in returned for t in reader.watched):
        reader.found.add("output")
    return reader.found or {"nothing"}


class _Readers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.watched: list[Tensor] = []
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is w for t in tensors_in((args, kwargs or {})) for w in self.watched):
            self.found.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def replace_module(
    model: nn.Module,
    name: str,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    log: UndoLog,
) -> None:
    """Put `module` in the place `name`; parameters that come and go join and leave the optimizers.

    Under the name `….inserted` it becomes what stands behind its parent.
    """
    where, _, child = name.rpartition(".")
    parent = model.get_submodule(where)
    old = parent._modules.get(child)
    order = list(parent._modules.items())

    def back() -> None:
        parent._modules.clear()
        parent._modules.update(order)

    log.add(back)
    parent._modules[child] = module
    if child == INSERTED:
        known = set(parent._forward_hooks)
        log.add(lambda: _unhook(parent, known))
        parent.register_forward_hook(run_inserted, with_kwargs=True)
    like = {n: id(p) for n, p in parent.named_parameters()} if child == INSERTED else {}
    mates = {id(p) for p in parent.parameters(recurse=False)}
    still = {id(p) for p in model.parameters()}
    gone = [p for p in ([] if old is None else old.parameters()) if id(p) not in still]
    mates |= {id(p) for p in gone}
    named = dict(module.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            here = {id(p) for p in group["params"]}
            fresh = [
                p for n, p in named.items() if like.get(n) in here
            ]  # of copies, each with its original
            if here & mates or fresh:
                fresh = [*fresh, *(p for n, p in named.items() if n not in like)]
                named = {n: p for n, p in named.items() if not any(p is f for f in fresh)}
                _regroup(group, gone, fresh, log)
        for parameter in gone:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                log.add(lambda o=optimizer, p=parameter, s=state: o.state.__setitem__(p, s))  # type: ignore[misc]
                del optimizer.state[parameter]


def _unhook(parent: nn.Module, known: Collection[int]) -> None:
    """Take back the hooks that run what is inserted, but for those of before."""
    hooks = parent._forward_hooks
    for key in [k for k, hook in hooks.items() if hook is run_inserted and k not in known]:
        del hooks[key]
        parent._forward_hooks_with_kwargs.pop(key, None)


def _regroup(
    group: dict[str, Any], gone: Sequence[Tensor], fresh: Sequence[Tensor], log: UndoLog
) -> None:
    params = list(group["params"])
    log.add(lambda: group.__setitem__("params", params))
    lost = {id(p) for p in gone}
    group["params"] = [*(p for p in params if id(p) not in lost), *fresh]


def first_input_and_output(
    model: nn.Module, batches: Sequence[Arguments], names: Sequence[str]
) -> dict[str, list[tuple[Tensor, Any]]]:
    """What modules take and give over some batches; the tensors are float64 on the CPU."""
    bench = quiet_copy(model)
    seen: dict[str, list[tuple[Tensor, Any]]] = {name: [] for name in names}
    for name in names:

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given = tensors_in((args, kwargs))
            made = tensors_in(output)
            if given and made:
                seen[name].append(
                    (given[0].detach().double().cpu(), made[0].detach().double().cpu())
                )

        bench.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    for batch in batches:
        forward_once(bench, batch)
    return seen


@dataclass(frozen=True, slots=True)
class Removal:
    """How a layer or a block can go: what stands in its place, and what makes up for it.

    slots, added: For tensors of what reads it, or of what writes before it.
    explained: Share of what the removed part did that the refit makes up for, on the calibration data.
    """

    instead: nn.Module
    slots: Mapping[str, Mapping[int, SlotMap]]
    added: Mapping[str, Tensor]
    explained: float


def removal_of(
    model: nn.Module, name: str, readers: Sequence[str], batches: Sequence[Arguments]
) -> Removal:
    """How the module `name` can be removed.

    A layer of a chain: its consumers (`readers`, linear) read what came before it, refitted by least squares. A
    residual block: the last linear layer that writes into the stream before it takes over what it added.

    Raises:
        SurgeryError: It is neither.
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
    return _block(model, name, batches, seen)


def _chain(
    model: nn.Module, name: str, readers: Sequence[str], batches: Sequence[Arguments]
) -> Removal:
    wrong = [r for r in readers if not isinstance(model.get_submodule(r), nn.Linear)]
    if wrong or not readers or not isinstance(model.get_submodule(name), nn.Linear):
        raise SurgeryError(
            f"{name!r} is no linear layer that only linear layers read, nor a block with a residual connection: it "
            "cannot be removed."
        )
    before = first_input_and_output(model, batches, readers)
    bench = quiet_copy(model)
    replace_module(bench, name, Bypass(), [], UndoLog())
    probe = _InputsOnly(bench, readers)
    for batch in batches:
        probe.run(batch)
    slots: dict[str, Mapping[int, SlotMap]] = {}
    added: dict[str, Tensor] = {}
    lost = total = 0.0
    for reader in readers:
        if len(probe.inputs[reader]) != len(before[reader]):
            raise SurgeryError(
                f"Without {name!r}, {reader!r} is not reached: what stands between does not take tensors as they are "
                f"before {name!r}."
            )
        linear: Any = model.get_submodule(reader)
        old = torch.cat([x.flatten(0, -2) for x, _ in before[reader]])
        new = torch.cat([x.flatten(0, -2) for x in probe.inputs[reader]])
        if len(old) != len(new):
            raise SurgeryError(f"Without {name!r}, {reader!r} reads tensors of another shape.")
        weight = linear.weight.detach().double().cpu()
        target = old @ weight.T
        fit, offset, residual = _least_squares(new, target, linear.bias is not None)
        lost += float(residual.square().sum())
        total += float((target - target.mean(0)).square().sum())
        slots[f"{reader}.weight"] = {1: SlotMap((None,) * new.shape[1])}
        added[f"{reader}.weight"] = fit.T
        if linear.bias is not None:
            added[f"{reader}.bias"] = offset
    return Removal(Bypass(), slots, added, 1 - lost / total if total else 1.0)


def _block(
    model: nn.Module, name: str, batches: Sequence[Arguments], seen: Sequence[tuple[Tensor, Any]]
) -> Removal:
    returns = _returns(model, name, batches[0])
    writer = _writer(model, name, batches[0], seen[0][0].shape)
    into = torch.cat([x.flatten(0, -2) for x, _ in seen])
    made = torch.cat([out.flatten(0, -2) for _, out in seen])
    # A block that adds to its input itself puts out something near to it; a branch of a sum does not.
    inside = float((made - into).square().sum()) < float(made.square().sum())
    did = made - into if inside else made
    instead = Bypass(returns, "input" if inside else "zero")
    if writer is None:
        return Removal(instead, {}, {}, 0.0)
    read = first_input_and_output(model, batches, [writer])[writer]
    hidden = torch.cat([x.flatten(0, -2) for x, _ in read])
    linear: Any = model.get_submodule(writer)
    fit, offset, residual = _least_squares(hidden, did, linear.bias is not None)
    total = float((did - did.mean(0)).square().sum())
    transposed = hasattr(linear, "nf")  # transformers' Conv1D
    added = {f"{writer}.weight": fit if transposed else fit.T}
    if linear.bias is not None:
        added[f"{writer}.bias"] = offset
    share = 1 - float(residual.square().sum()) / total if total else 1.0
    return Removal(instead, {}, added, share)


def _writer(model: nn.Module, name: str, batch: Arguments, shape: torch.Size) -> str | None:
    """The last linear layer before the block whose output is added into its input, as it is."""
    linears = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (hasattr(m, "nf") and hasattr(m, "weight"))
        if not n.startswith(name + ".")
    ]
    bench = quiet_copy(model)
    order: list[str] = []
    entered: list[Tensor] = []
    bench.get_submodule(name).register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(tensors_in((args, kwargs))[0]), with_kwargs=True
    )
    push = torch.randn(shape[-1], generator=torch.Generator().manual_seed(0))
    pushed = [""]  # the layer whose output is pushed
    for n in linears:

        def hook(module: nn.Module, args: Any, output: Any, n: str = n) -> Any:
            if not entered and isinstance(output, Tensor) and output.shape == shape:
                order.append(n)
            return output + push.to(output) if pushed[0] == n else None

        bench.get_submodule(n).register_forward_hook(hook)
    forward_once(bench, batch)
    base, first = entered[0].double(), list(order)
    for n in reversed(first):
        entered.clear()
        pushed[0] = n
        forward_once(bench, batch)
        moved = entered[0].double() - base
        if float((moved - push.to(base)).abs().max()) < 1e-3 and first.count(n) == 1:
            return n
    return None


def _returns(model: nn.Module, name: str, batch: Arguments) -> str:
    bench = quiet_copy(model)
    kinds: list[str] = []
    bench.get_submodule(name).register_forward_hook(
        lambda m, a, out: kinds.append("tuple" if isinstance(out, tuple) else "tensor")
    )
    forward_once(bench, batch)
    return kinds[0]


class _InputsOnly:
    """The inputs of some modules, of which the code behind may fail."""

    def __init__(self, bench: nn.Module, names: Sequence[str]) -> None:
        self.bench, self.inputs = bench, {name: list[Tensor]() for name in names}
        for name in names:
            bench.get_submodule(name).register_forward_pre_hook(
                lambda m, args, kwargs, name=name: self.inputs[name].append(
                    tensors_in((args, kwargs))[0].detach().double().cpu()
                ),
                with_kwargs=True,
            )

    def run(self, batch: Arguments) -> None:
        # The widths do not fit yet: what counts has been seen before that shows.
        with suppress(StructureError):
            forward_once(self.bench, batch)


def _least_squares(x: Tensor, y: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (in, out), offset (out,), residual (n, out) of the ridge fit y ≈ x·B + c."""
    mean_x = x.mean(0) if centred else torch.zeros(x.shape[1]).double()
    mean_y = y.mean(0) if centred else torch.zeros(y.shape[1]).double()
    a, b = x - mean_x, y - mean_y
    gram = a.T @ a
    ridge = 1e-4 if len(x) >= 4 * x.shape[1] else 1e-2
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    fit = torch.linalg.solve(gram, a.T @ b)
    return fit, mean_y - mean_x @ fit, b - a @ fit

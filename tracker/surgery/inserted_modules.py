"""Depth: layers that are inserted without a trace, and what stands in the place of those that are removed.

Names stay: an inserted layer is a child of the layer behind which it stands, a removed one is left as a bypass. So
the keys of all other parameters, and everything that speaks of layers by name, stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.errors import SurgeryError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import kind_of, weight_of
from tracker.modules.layers import known_width
from tracker.surgery.undo import UndoLog
from tracker.utils.nested import tensors_in

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
        result: Tensor = x + self.out(torch.relu(self.into(x)))
        return result


class ReluIdentity(nn.Module):
    """linear(relu(x)), `linear` the identity at birth: before a ReLU it changes nothing, since relu∘relu = relu."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        weight: Any = linear.weight
        with torch.no_grad():
            weight.zero_()
            index = torch.arange(weight.shape[0])
            place = (index, index, *[0] * (weight.ndim - 2))
            weight[place] = 1.0
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: the output of the layer before."""
        result: Tensor = self.linear(torch.relu(x))
        return result


class Bypass(nn.Module):
    """What is left of a removed module: scale · x + shift of its first input x.

    A scale of 0 gives zeros: those of a branch whose sum stands outside of it.

    Args:
        returns: "tensor" or "tuple", as the module did.
        scale: What the input is multiplied with.
        shift: What is added.
    """

    def __init__(self, returns: str = "tensor", scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.returns, self.scale, self.shift = returns, scale, shift

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Any:
        """x: the first input of the module that was here."""
        y = x if self.scale == 1 else x * self.scale if self.scale else torch.zeros_like(x)
        y = y + self.shift if self.shift else y
        return (y,) if self.returns == "tuple" else y


def run_inserted(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook of a layer or block with an inserted one: the output goes through it.

    What stands behind a block is called as the block was, its output in the place of the first tensor.
    """
    inserted: Any = module._modules[INSERTED]
    if is_layer(module):
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
    kind = kind_of(layer)
    if width is None or kind is None or kind.follower is None:
        raise SurgeryError(
            f"A layer can be inserted after a linear or a convolutional one; {name!r} is a {type(layer).__name__}."
        )
    n, follower = width[0], kind.follower
    weight = weight_of(layer)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}

    def linear() -> nn.Module:
        return follower(layer, n, options)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if read_by(model, inputs, name) <= {"relu", "relu_"}:
            return ReluIdentity(linear()).train(layer.training)
        return ResidualBlock(linear(), linear()).train(layer.training)


def can_follow(layer: nn.Module) -> bool:
    """Whether another layer can be inserted behind this one."""
    return is_layer(layer) and INSERTED not in layer._modules


def is_layer(module: nn.Module) -> bool:
    """Whether it is of a kind behind which a layer of its own width can stand, and no block."""
    kind = kind_of(module)
    return kind is not None and kind.follower is not None


def inserted_layers(model: nn.Module) -> int:
    """Layers that were inserted so far, with those that were removed again."""
    return sum(name.rpartition(".")[2] == INSERTED for name, _ in model.named_modules())


def read_by(model: nn.Module, inputs: Arguments, name: str) -> set[str]:
    """Names of the operations that take the output of a layer."""
    trial_copy = copy_without_hooks(model)
    reader = _Readers()

    def watch(module: nn.Module, args: object, output: object) -> None:
        reader.watched = [*reader.watched, *tensors_in(output)]

    trial_copy.get_submodule(name).register_forward_hook(watch)
    output = forward_once(trial_copy, inputs, within=reader)
    returned = {id(t) for t in tensors_in(output)}
    if any(id(t) in returned for t in reader.watched):
        reader.found.add("output")
    return reader.found or {"nothing"}


class _Readers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched: list[Tensor] = []
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is w for t in tensors_in((args, kwargs or {})) for w in self.watched):
            self.found.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def put_module(model: nn.Module, name: str, module: nn.Module | None, log: UndoLog) -> None:
    """Put `module` in the place `name`, or leave it empty.

    Under the name `….inserted` it becomes what stands behind its parent.
    """
    where, _, child = name.rpartition(".")
    parent = model.get_submodule(where)
    order = list(parent._modules.items())
    hooks: tuple[dict[int, Any], ...] = (parent._forward_hooks, parent._forward_hooks_with_kwargs)
    before = [dict(table) for table in hooks]

    def back() -> None:
        parent._modules.clear()
        parent._modules.update(order)

    def rehook() -> None:
        for table, content in zip(hooks, before, strict=True):
            table.clear()
            table.update(content)

    log.add(back)
    log.before.modules.setdefault((id(model), name), (model, name, parent._modules.get(child)))
    if module is None:
        del parent._modules[child]
    else:
        parent._modules[child] = module
    if child != INSERTED:
        return
    known = set(parent._forward_hooks)
    log.add(lambda: _unhook(parent, known))
    if module is None:
        log.add(rehook)
        _unhook(parent, ())
    elif run_inserted not in parent._forward_hooks.values():
        parent.register_forward_hook(run_inserted, with_kwargs=True)


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
    put_module(model, name, module, log)
    like = {n: id(p) for n, p in parent.named_parameters()} if child == INSERTED else {}
    mates = {id(p) for p in parent.parameters(recurse=False)}
    still = {id(p) for p in model.parameters()}
    gone = [p for p in ([] if old is None else old.parameters()) if id(p) not in still]
    mates |= {id(p) for p in gone}
    named = dict(module.named_parameters())
    for optimizer in optimizers:
        joins = list(named.values())
        log.add(lambda o=optimizer, j=joins: [o.state.pop(p, None) for p in j])  # type: ignore[misc]
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
                log.before.states.setdefault(
                    (id(optimizer), id(parameter)), (optimizer, parameter, state)
                )
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
    log.before.groups.setdefault(id(group), (group, params))
    lost = {id(p) for p in gone}
    group["params"] = [*(p for p in params if id(p) not in lost), *fresh]

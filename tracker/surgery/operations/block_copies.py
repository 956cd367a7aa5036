"""Blocks inserted as copies: a residual block again, behind itself, silent until it learns.

Source: Wu et al., LLaMA Pro: Progressive LLaMA with Block Expansion (ACL 2024), section 3.2: a copy of which the layers
that write into the stream are zero is the identity.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tracker.errors import SurgeryError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.structure.adapters.transformers_stacks import (
    CONFIGS,
    INDEX,
    KINDS,
    config_of,
    count_name,
    places,
)
from tracker.structure.code_sizes.traced_int import Attribute, is_config
from tracker.surgery.inserted_modules import INSERTED, again_with, run_inserted
from tracker.utils.nested import tensors_in


def is_block(module: nn.Module) -> bool:
    """Whether a module is made of others with parameters: no layer by itself."""
    return bool(module._modules) and any(True for _ in module.parameters())


def copied(model: nn.Module, name: str) -> nn.Module:
    """A copy of the block `name`, with parameters of its own; a place in a stack is a new one behind the last."""
    own, place = _duplicate(model, name), places(model)
    _settle(own, place)
    return own


def _settle(block: nn.Module, place: int) -> None:
    for module in block.modules():
        if type(vars(module).get(INDEX)) is int:
            vars(module)[INDEX] = place


def _duplicate(model: nn.Module, name: str) -> nn.Module:
    block = model.get_submodule(name)
    shared = {id(v): v for m in block.modules() for v in vars(m).values() if is_config("", v)}
    own = copy.deepcopy(block, shared)
    own._modules.pop(INSERTED, None)
    for module in own.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for key in [k for k, hook in hooks.items() if not _stays(own, module, hook)]:
                del hooks[key]
    return own


def counted(model: nn.Module, block: nn.Module) -> dict[Attribute, int]:
    """What has to change for caches to have room for one more block: the configuration's count of them.

    Raises:
        SurgeryError: The configuration counts them otherwise: caches would have no room.
    """
    if not any(type(vars(m).get(INDEX)) is int for m in block.modules()):
        return {}
    owners = [(path, own) for path in CONFIGS if (own := config_of(model, path)) is not None]
    for path, config in owners:
        name, taken = count_name(config), places(model)
        kinds = vars(config).get(KINDS)
        if vars(config).get(name) == taken and (kinds is None or len(kinds) == taken):
            return {Attribute("", path, name): taken + 1}
    if owners:
        raise SurgeryError(
            "A copy of this block cannot be inserted: the model's configuration counts its blocks otherwise than "
            f"they do ({places(model)}), and caches made of it would have no room for one more."
        )
    return {}


def block_copy(model: nn.Module, inputs: Arguments, name: str) -> nn.Module:
    """A copy of the residual block `name` that passes on what it is given, and can learn.

    Of its parameters as few as possible are zero, the last ones of each branch.

    Raises:
        SurgeryError: It is no block whose output has the shape of its input and that a zero silences.
    """
    calls = _calls(model, inputs, name)
    if len(calls) != 1:
        raise SurgeryError(
            f"{name!r} is called {len(calls)} times in a pass: only behind a block that is called once a copy can "
            "stand."
        )
    args, kwargs, output, order = calls[0]
    outer, inner = tensors_in((args, kwargs)), tensors_in(output)
    if not outer or not inner or outer[0].shape != inner[0].shape:
        raise SurgeryError(
            f"A layer can be inserted after a linear or convolutional one, or a block whose output has the shape of "
            f"its input; {name!r} is neither."
        )
    block, stream = _duplicate(model, name), inner[0]
    # By the calls of their modules; what no module is called for comes last.
    called = [
        (order.index(n) if n in order else len(order), p)
        for n, m in block.named_modules()
        for p in m.parameters(recurse=False)
        if p.is_floating_point()
    ]
    ranked = [p for _, p in sorted(called, key=lambda pair: pair[0])]
    values = [p.detach().clone() for p in ranked]

    def passes_on() -> bool:
        # Caches are written by each call: every one gets its own.
        own = again_with(copy.deepcopy(args), copy.deepcopy(kwargs), stream)
        return torch.equal(tensors_in(forward_once(block, Arguments(*own)))[0], stream)

    with torch.no_grad():
        for parameter in ranked:
            parameter.zero_()
        if not passes_on():
            raise SurgeryError(
                f"A copy of {name!r} cannot be made to pass on what it is given: it is no residual block, or a norm "
                "stands behind its sum."
            )
        for parameter, value in zip(ranked, values, strict=True):
            parameter.copy_(value)
            if not passes_on():
                parameter.zero_()
    _settle(block, places(model))
    return block.train(model.get_submodule(name).training)


def _calls(model: nn.Module, inputs: Arguments, name: str) -> list[tuple[Any, Any, Any, list[str]]]:
    """Arguments and output of each call of a block, and its modules in the order in which they are done."""
    trial_copy = copy_without_hooks(model)
    block, calls, order = trial_copy.get_submodule(name), [], list[str]()
    given: list[tuple[Any, Any]] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(copy.deepcopy((args, kwargs)))  # before it writes to caches

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        calls.append((*given.pop(), output, order))

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)
    for inner, module in block.named_modules():
        module.register_forward_hook(lambda m, a, o, inner=inner: order.append(inner))
    forward_once(trial_copy, inputs)
    return calls


def _stays(block: nn.Module, module: nn.Module, hook: Any) -> bool:
    """Hooks of torch are part of what a module computes, and so is one that runs an inserted layer inside."""
    if hook is run_inserted:
        return module is not block
    owner = hook if hasattr(hook, "__qualname__") else type(hook)
    return (getattr(owner, "__module__", None) or "").startswith("torch.")

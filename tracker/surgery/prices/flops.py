"""Floating-point operations of one forward pass, in all and module by module."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tracker.inputs.calls import Arguments, Call
from tracker.inputs.forward_pass import forward_once
from tracker.structure.trace import plain_kernels


def flops(model: nn.Module, inputs: Arguments | Call) -> tuple[object, int]:
    """Output and FLOPs of a pass in eval mode, or in that of the call, by torch's own formulas (`flop_counter`)."""
    counter = _Counter()
    with plain_kernels():  # fused ones have no formula
        output = forward_once(model, inputs, within=counter)
    return output, counter.total


def flops_by_module(model: nn.Module, inputs: Arguments) -> tuple[Counter[str], int]:
    """FLOPs of each module's own operations (not of its children's), and in all."""
    counter = _Counter()
    path = [""]
    handles = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: object, name: str = name) -> None:
            path.append(name)

        def leave(module: nn.Module, args: object, output: object) -> None:
            path.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    counter.path = path
    try:
        with plain_kernels():
            forward_once(model, inputs, within=counter)
    finally:
        for handle in handles:
            handle.remove()
    return counter.by_module, counter.total


def flops_by_weight(model: nn.Module, inputs: Arguments) -> tuple[dict[str, float], float]:
    """FLOPs of each layer's weight, by its name, and those that belong to none."""
    by_module, total = flops_by_module(model, inputs)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if len(own) == 1 and name:
            found[f"{name}.{own[0]}"] = float(by_module[name])
    return found, total - sum(found.values())


class _Counter(TorchDispatchMode):
    # Not FlopCounterMode: its hooks fail on modules that keep tensors of an earlier graph.
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.by_module: Counter[str] = Counter()
        self.path = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=result)
            self.total += count
            self.by_module[self.path[-1]] += count
        return result

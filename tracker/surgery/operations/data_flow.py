"""Where the output of one module goes, and whether its input goes through it: seen operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import is_linear
from tracker.utils.nested import tensors_in

_SUMS = ("add", "add_", "sub", "sub_", "rsub")
# Of the same values: memory layouts and dtypes.
_SAME = (
    "clone",
    "contiguous",
    "_to_copy",
    "copy_",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_copy",
)
# What a refit of the readers behind can make up for, though it is no view and no function of single elements.
_BETWEEN = (
    "native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_fused_rms_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "mean", "avg_pool2d", "max_pool2d_with_indices",
    "_adaptive_avg_pool2d", "avg_pool1d", "avg_pool3d",
)  # fmt: skip
_OF_THE_SHAPE = (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_empty",
    "new_ones",
)


@dataclass(slots=True)
class Flow:
    """What one pass shows of a module.

    Attributes:
        through: The output is the input plus something: the module adds to its input itself.
        readers: Linear layers whose input its output is, or becomes by operations on single elements, norms, and pools.
        summed: Something else is added to its output.
        elsewhere: What else takes it: operations by name, and "output".
    """

    through: bool = False
    readers: list[str] = field(default_factory=list)
    summed: bool = False
    elsewhere: set[str] = field(default_factory=set)

    @property
    def is_branch(self) -> bool:
        """Whether all that happens to the output is that it is added to something."""
        return self.summed and not (self.through or self.readers or self.elsewhere)

    @property
    def is_read(self) -> bool:
        """Whether linear layers alone take the output."""
        return bool(self.readers) and not (self.summed or self.elsewhere)


def flow_of(model: nn.Module, inputs: Arguments, name: str) -> Flow:
    """What becomes of the input and of the output of the module `name` in one pass."""
    trial_copy = copy_without_hooks(model)
    target = trial_copy.get_submodule(name)
    seen = _Follower({id(t) for t in (*trial_copy.parameters(), *trial_copy.buffers())})

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.stream = WeakTensorKeyDictionary()
        for tensor in tensors_in((args, kwargs))[:1]:
            seen.stream[tensor] = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        made = tensors_in(output)[:1]
        seen.flow.through = bool(made) and made[0] in seen.stream
        seen.stream = WeakTensorKeyDictionary()
        for tensor in made:
            seen.came[tensor] = True

    target.register_forward_pre_hook(enter, with_kwargs=True)
    target.register_forward_hook(leave)
    for reader, module in trial_copy.named_modules():
        if is_linear(module):
            seen.watch(reader, module)
    output = forward_once(trial_copy, inputs, within=seen)
    if any(t in seen.came for t in tensors_in(output)):
        seen.flow.elsewhere.add("output")
    return seen.flow


class _Follower(TorchDispatchMode):
    """Follows the module's input while the module runs (`stream`), and its output afterwards (`came`)."""

    def __init__(self, held: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        self.stream, self.came = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._held = held  # parameters and buffers, by id
        self._inside = 0  # of readers

    def watch(self, name: str, module: nn.Module) -> None:
        """Notice when this layer reads what is followed."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if any(t in self.came for t in tensors_in((args, kwargs))[:1]):
                self.flow.readers.append(name)
                self._inside += 1

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if any(t in self.came for t in tensors_in((args, kwargs))[:1]):
                self._inside -= 1

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            name = func._schema.name.removeprefix("aten::")
            given = tensors_in((args, kwargs or {}))
            self._follow_stream(func, name, args, given, result)
            self._follow_output(func, name, given, result)
        return result

    def _follow_stream(
        self, func: Any, name: str, args: Any, given: list[Tensor], result: Any
    ) -> None:
        here = [t for t in given if t in self.stream]
        if not here:
            return
        makes = [result] if isinstance(result, Tensor) else []
        same = (func.is_view or name in _SAME) and all(t.numel() == here[0].numel() for t in makes)
        # The input itself, once: neither subtracted from something nor added to itself.
        adds = name in ("add", "add_") and len(here) == 1
        adds |= name in ("sub", "sub_") and args[0] in self.stream and len(here) == 1
        if same or adds:
            self.stream.update(dict.fromkeys(makes, True))
        elif func._schema.is_mutable and given[0] in self.stream:
            del self.stream[given[0]]

    def _follow_output(self, func: Any, name: str, given: list[Tensor], result: Any) -> None:
        here = [t for t in given if t in self.came]
        if not here or name in _OF_THE_SHAPE:
            return
        others = [
            t for t in given if t not in self.came and t.numel() > 1 and id(t) not in self._held
        ]
        if name in _SUMS and others:
            self.flow.summed = True
            if func._schema.is_mutable and given[0] in self.came:
                del self.came[given[0]]
        elif func.is_view or name in _SAME or name in _BETWEEN or torch.Tag.pointwise in func.tags:
            for tensor in tensors_in(result):
                self.came[tensor] = True
        else:
            self.flow.elsewhere.add(name)

"""Which way a pass takes: its operations, and what each of them is given, told apart from those of another pass."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.utils.nested import tensors_in

# The result is the same value at every position, if all that is given is.
_UNIFORM = {
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
    "full_like", "empty_like",
}  # fmt: skip
_COPIES = ("clone", "detach", "alias", "lift_fresh")
_FILLS = ("fill_", "zero_")
_SCALES = ("mul", "mul_", "div", "div_")
_BATCH_NORMS = {
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
}  # fmt: skip


class Path:
    """The operations of one pass: equal paths relate the same axes of the same weights in the same way.

    What says nothing of axes is left out: products with a tensor that has one value everywhere (the mask of a dropout
    that drops nothing), the counter of a batch norm, and whether that norm uses the statistics of the batch.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.rows: list[object] = []
        self._names = names
        self._numbers: dict[int, tuple[weakref.ref[Tensor], object]] = {}  # by id, which is reused
        self._uniform: dict[int, weakref.ref[Tensor]] = {}  # by where the values lie
        self._count = self._given = 0

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take one operation in."""
        name = func._schema.name.removeprefix("aten::")
        given = tensors_in((args, kwargs))
        made = tensors_in(result)
        target = given[0] if given else None
        filled = name in _FILLS and (self._is_uniform(given[0]) or _is_whole(given[0]))
        pointwise = torch.Tag.pointwise in func.tags and bool(made)
        if name in _UNIFORM or filled or (pointwise and all(map(self._is_uniform, given))):
            self._make_uniform(name, given, made)
            return
        if func.is_view and target is not None and self._is_uniform(target):
            return
        if name in _COPIES and target is not None:
            self._same(target, made[0])
            return
        scaled = name in _SCALES and len(given) == 2 and made[0].shape == given[0].shape
        if scaled and self._is_uniform(given[1]):  # the first is not, else the result would be
            self._same(given[0], made[0])
            return
        if (
            name == "add_"
            and target is not None
            and not (target.ndim or target.is_floating_point())
        ):
            return
        if name in _BATCH_NORMS:
            name, args = "batch_norm", tuple(args[:5])
        self.rows.append((name, self._told(args), self._told(kwargs)))
        self._count += 1
        for at, tensor in enumerate(made):
            self._numbers[id(tensor)] = weakref.ref(tensor), (self._count, at)
            if not func.is_view:
                self._uniform.pop(_storage(tensor), None)

    def end(self, output: object) -> None:
        """Take in what the pass returns."""
        self.rows.append(("output", [self._told(t) for t in tensors_in(output)]))

    def _make_uniform(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        for tensor in made:
            self._numbers.pop(id(tensor), None)
            inside = name.endswith("_") and not _is_whole(tensor)
            # A part of a tensor that is written over differs from the rest.
            if inside:
                self._uniform.pop(_storage(tensor), None)
            else:
                self._uniform[_storage(tensor)] = weakref.ref(tensor)

    def _is_uniform(self, tensor: Tensor) -> bool:
        made = self._uniform.get(_storage(tensor))
        return made is not None and made() is not None

    def _same(self, tensor: Tensor, made: Tensor) -> None:
        if self._is_uniform(tensor):
            self._make_uniform("", [tensor], [made])
        else:
            self._numbers[id(made)] = weakref.ref(made), self._told(tensor)
            self._uniform.pop(_storage(made), None)

    def _told(self, value: Any) -> Any:
        """An argument, tensors by where they come from."""
        if isinstance(value, Tensor):
            if (name := self._names.get(id(value))) is not None:
                return name
            ref, number = self._numbers.get(id(value), (None, None))
            if ref is None or ref() is not value:
                self._given += 1
                number = "given", self._given
                self._numbers[id(value)] = weakref.ref(value), number
            return number
        if isinstance(value, (tuple, list)):
            return tuple(map(self._told, value))
        if isinstance(value, dict):
            return tuple((key, self._told(part)) for key, part in value.items())
        return None if isinstance(value, torch.Generator) else value


class OpPathRecorder(TorchDispatchMode):
    """Inside, notes the path of a pass."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path = Path(names)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.path.note(func, args, kwargs, result)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()

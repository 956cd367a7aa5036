"""Code that names dtypes, run in float64 nevertheless; and how far apart two runs may be where it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.inputs.calls import Arguments, Call
from tracker.utils.nested import replaced

TOLERANCE = 1e-9  # relative, in float64: removing what is masked differs by rounding, about 1e-15
_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """In which dtypes copies of a model are compared."""

    in_float64: bool = True  # else in the model's own dtypes
    tolerance: float = TOLERANCE  # relative difference that is rounding
    why: str = ""  # what does not run in float64

    def __str__(self) -> str:
        if self.in_float64:
            return f"in float64, within {self.tolerance:.0e}"
        return f"in the model's own dtypes, within {self.tolerance:.1e}, as it does not run in float64: {self.why}"


@overload
def double(inputs: Call) -> Call: ...
@overload
def double(inputs: Arguments) -> Arguments: ...
def double(inputs: Arguments | Call) -> Arguments | Call:
    """The same arguments or call, floating-point tensors in float64."""
    if isinstance(inputs, Call):
        return inputs.given(*replaced((inputs.args, inputs.kwargs), wider))
    return Arguments(*replaced(tuple(inputs), wider))


def wider(tensor: Tensor) -> Tensor:
    """A tensor in float64 (complex128), if it is one of numbers with a point."""
    dtype = _WIDER.get(tensor.dtype)
    return tensor if dtype is None else tensor.to(dtype)


class Float64Code(TorchDispatchMode):
    """Inside, whatever the code asks for in float32, float16 or bfloat16 is made in float64.

    Casts, constants, defaults, results of integers, and tensors kept elsewhere than as parameters and buffers. Dtypes
    of eight bits and integers stay: they are part of what the model computes. What is written to in place keeps its
    dtype. No state of other threads (as torch's default dtype is) is touched.

    Raises:
        TypeError: Inside, where the bits of a number are read as those of another dtype.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation with arguments of float64."""
        if func is torch.ops.aten.view.dtype and args[0].dtype != _WIDER.get(args[1], args[1]):
            raise TypeError(f"the bits of numbers are read as {args[1]}")
        written, names = _written(func)
        args = tuple(a if i in written else _in_float64(a) for i, a in enumerate(args))
        kwargs = {k: v if k in names else _in_float64(v) for k, v in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        return result if written or names else _in_float64(result)


@cache
def _written(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the arguments that an operation writes to."""
    written = [
        (i, a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return frozenset(i for i, _ in written), frozenset(name for _, name in written)


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return wider(value)
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if type(value) in (list, tuple):
        return type(value)(map(_in_float64, value))
    return value

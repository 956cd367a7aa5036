"""A pass in train mode that can be compared with another: nothing is drawn, and nothing is written into weights."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten


@contextmanager
def certain(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, passes of a model of these modules draw no random numbers: each draw gives the same constant everywhere.

    What is drawn depends on the sizes of tensors, so a model without some of its units would draw other masks for its
    dropout. Parameters that the model's code writes into have their values back afterwards. A batch norm that sees one
    value for each channel, which has no variance, runs as in eval mode.
    """
    mode = _Constant(modules)
    norms = [m for m in modules if isinstance(m, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(_without_variance) for norm in norms]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        mode.put_back()


def _without_variance(norm: nn.Module, args: tuple[Any, ...]) -> None:
    x = args[0] if args else None
    if isinstance(x, Tensor) and x.ndim > 1 and x.numel() == x.shape[1]:
        norm.training = False


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's and NumPy's random states are as before afterwards; of torch's the devices take care."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None and state is not None:
            numpy.random.set_state(state)


@contextmanager
def writes_put_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters and other tensors of modules that are written into inside have their values back afterwards."""
    mode = _Writes(modules)
    try:
        with mode:
            yield
    finally:
        mode.put_back()


def open_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """All but those that were scripted or traced, whose tables are not Python's."""
    return [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]


def unheard() -> AbstractContextManager[None]:
    """Inside, no mode of torch functions hears what is asked of tensors: it is none of the model's code."""
    return torch._C.DisableTorchFunction()


class _Writes(TorchDispatchMode):
    """Tensors that modules hold are noted before they are written into."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._held: dict[int, list[Tensor]] = {}  # by where their values lie
        with unheard():
            for module in open_modules(modules):
                for held in (*dict.values(module._parameters), *vars(module).values()):
                    if isinstance(held, Tensor) and held.layout is torch.strided and held.numel():
                        self._held.setdefault(_storage(held), []).append(held)

    def put_back(self) -> None:
        """Give tensors that were written into their values back."""
        with torch.no_grad():
            for held, value in reversed(self._saved):
                held.copy_(value)
        self._saved.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for at, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[at] if at < len(args) else kwargs.get(argument.name)
                    if isinstance(value, Tensor) and value.layout is torch.strided:
                        self._note(value)
        return func(*args, **kwargs)

    def _note(self, written: Tensor) -> None:
        for held in self._held.pop(_storage(written), ()) if written.numel() else ():
            data = held.data
            self._saved.append((data, data.clone()))


class _Constant(_Writes):
    """Draws become constants, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        constant = _CONSTANT.get(func._schema.name)
        if constant is not None:
            return constant(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


Draw = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _option(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any) -> Any:
    return args[at] if at < len(args) else kwargs.get(name, default)


def _made(value: float) -> Draw:
    """A new tensor of given sizes."""

    def draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _ATEN.full(args[0], value, **{k: v for k, v in kwargs.items() if k in _KINDS})

    return draw


def _like(value: float) -> Draw:
    """A new tensor like the first argument."""

    def draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _ATEN.full_like(args[0], value, **{k: v for k, v in kwargs.items() if k in _KINDS})

    return draw


def _filled(value: Callable[[float, float], float], names: tuple[str, str]) -> Draw:
    """The first argument, written over; its value follows from two options of the call, by default 0 and 1."""

    def draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = _option(args, kwargs, 1, names[0], 0.0)
        second = _option(args, kwargs, 2, names[1], 1.0)
        plain = isinstance(first, int | float) and isinstance(second, int | float)
        return _ATEN.fill_(args[0], value(first, second) if plain else value(0.0, 1.0))

    return draw


def _normal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mean, std = _option(args, kwargs, 0, "mean", 0.0), _option(args, kwargs, 1, "std", 1.0)
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return mean + std * SOME
    kinds = {k: v for k, v in kwargs.items() if k in _KINDS}
    return _ATEN.full(_option(args, kwargs, 2, "size", ()), mean + std * SOME, **kinds)


def _rrelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    low = _option(args, kwargs, 2, "lower", 0.125)
    high = _option(args, kwargs, 3, "upper", 1 / 3)
    plain = _ATEN.leaky_relu_ if func._schema.name.endswith("_") else _ATEN.leaky_relu
    return plain(args[0], (low + high) / 2)


def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].clone(), _ATEN.full_like(args[0], True, dtype=torch.bool)


SOME = 0.25  # of a normal distribution: not its mean, at which much vanishes
_KINDS = ("dtype", "layout", "device", "pin_memory")
_CONSTANT: dict[str, Draw] = {
    "aten::rand": _made(0.5), "aten::rand_like": _like(0.5),
    "aten::randn": _made(SOME), "aten::randn_like": _like(SOME),
    "aten::bernoulli": _like(1.0), "aten::normal": _normal,
    "aten::bernoulli_": _filled(lambda *_: 1.0, ("", "")),
    "aten::uniform_": _filled(lambda a, b: (a + b) / 2, ("from", "to")),
    "aten::normal_": _filled(lambda mean, std: mean + std * SOME, ("mean", "std")),
    "aten::exponential_": _filled(lambda *_: 1.0, ("", "")),
    "aten::geometric_": _filled(lambda *_: 1.0, ("", "")),
    "aten::cauchy_": _filled(lambda *_: SOME, ("", "")),
    "aten::log_normal_": _filled(lambda *_: math.exp(SOME), ("", "")),
    "aten::rrelu_with_noise": _rrelu, "aten::rrelu_with_noise_": _rrelu,
    "aten::native_dropout": _dropout,
}  # fmt: skip

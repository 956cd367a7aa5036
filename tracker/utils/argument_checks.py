"""What callers pass is held against the annotations of the public calls, before anything is looked at or touched."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, Union

from torch import Tensor

from tracker.errors import TrackerError

T = TypeVar("T", bound=type)


def checked(
    error: type[TrackerError], *, itself: Collection[str] = (), **others: type[TrackerError]
) -> Callable[[T], T]:
    """Class decorator: the public methods that a class defines refuse arguments that their annotations do not allow.

    Args:
        error: What is raised. A call with too many arguments, or too few, stays a TypeError of Python's.
        itself: Arguments that the methods check themselves, and say more about.
        **others: What is raised by methods, or for arguments, of these names.
    """

    def decorate(kind: T) -> T:
        for name, member in list(vars(kind).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if inspect.isfunction(member):
                setattr(kind, name, _checked(member, others.get(name, error), itself, others))
            elif isinstance(member, classmethod):
                held = _checked(member.__func__, others.get(name, error), itself, others)
                setattr(kind, name, classmethod(held))
        return kind

    return decorate


def _checked(
    function: Callable[..., Any],
    error: type[TrackerError],
    itself: Collection[str],
    others: Mapping[str, type[TrackerError]],
) -> Callable[..., Any]:
    signature = inspect.signature(function)
    if len(signature.parameters) == 1:
        return function

    @functools.cache
    def stated() -> dict[str, Any]:  # at the first call: annotations may name what is defined later
        return {k: v for k, v in _hints(function).items() if k not in itself}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hints = stated()
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # with Python's own message
        for name, value in given.arguments.items():
            kind = signature.parameters[name].kind
            values = value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)
            values = value.values() if kind is inspect.Parameter.VAR_KEYWORD else values
            for one in values:
                if name in hints and not fits(one, hints[name]):
                    raise others.get(name, error)(
                        f"{_called(function)}: {name} is {described_type(hints[name])}, not {shown(one)}."
                    )
        return function(*args, **kwargs)

    return call


def _called(function: Callable[..., Any]) -> str:
    owner, _, name = function.__qualname__.rpartition(".")
    return owner if name == "__init__" else name


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's parameters. What it returns may not be importable yet."""
    function = inspect.unwrap(function)  # where it was written, its names are known
    stated = {k: v for k, v in function.__annotations__.items() if k != "return"}
    bare = types.SimpleNamespace(__annotations__=stated)
    return typing.get_type_hints(bare, function.__globals__)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is what an annotation says. Of what can be walked through only once, the items are not seen."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return _is_whole(value)
    if hint is float:
        return _is_number(value)
    if origin is tuple:
        return _is_tuple(value, inner)
    kind = origin or hint
    if kind is Callable or kind is typing.get_origin(Callable[..., Any]):
        return callable(value)
    if not isinstance(kind, type):
        return True
    if not isinstance(value, kind) or (
        isinstance(value, Tensor) and not value.ndim and kind is not Tensor
    ):
        return False
    if not inner:
        return True
    if isinstance(value, Mapping) and issubclass(kind, Mapping):
        return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if issubclass(kind, Iterable):
        if isinstance(value, (str, bytes, Mapping)):
            return isinstance(value, Mapping) and inner[0] is Any
        items = value if isinstance(value, (list, tuple, set, frozenset)) else ()
        return all(fits(item, inner[0]) for item in items)
    return True


def described_type(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described_type(one) for one in inner))
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    if hint in words:
        return words[hint]
    if hint is None or hint is type(None):
        return "None"
    kind = origin or hint
    if kind is typing.get_origin(Callable[..., Any]):
        return "a function"
    if isinstance(kind, type) and issubclass(kind, Mapping) and inner:
        return f"a dict {{{described_type(inner[0])}: {described_type(inner[1])}}}"
    if kind is tuple and inner:
        return f"({', '.join(map(described_type, inner))})"
    if isinstance(kind, type) and issubclass(kind, Iterable) and inner:
        of = "" if inner[0] is Any else f", each {described_type(inner[0])}"
        return f"a list{of}"
    return f"a {getattr(kind, '__name__', kind)}"


def shown(value: object) -> str:
    """A value, short enough for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def _is_whole(value: object) -> bool:
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.numel() != 1):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _is_number(value: object) -> bool:
    if isinstance(value, (bool, str, bytes)) or (isinstance(value, Tensor) and value.numel() != 1):
        return False
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return True


def _is_tuple(value: object, inner: tuple[Any, ...]) -> bool:
    """A tuple of these; a list, as JSON has it, will do."""
    if not isinstance(value, (tuple, list)):
        return False
    if len(inner) == 2 and inner[1] is Ellipsis:
        return all(fits(item, inner[0]) for item in value)
    return len(value) == len(inner) and all(map(fits, value, inner))

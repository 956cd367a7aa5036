"""How a model is called: examples of calls, each of one method, in one mode or in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tracker.errors import StructureError


class Call:
    """One call of a model, as an example of how it is used.

    Args:
        *args: Positional arguments of the call.
        method: Name of the method that is called.
        training: True: the call is made in train mode only; False: in eval mode only; None: in both.
        **kwargs: Keyword arguments of the call.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 5)
        >>> example_inputs = [Call(x), Call(x, more=True), Call(x, method="reconstruct")]
        >>> example_inputs[1]
        forward(Tensor(2, 5), more=True)
    """

    __slots__ = ("args", "kwargs", "method", "training")

    def __init__(
        self, *args: Any, method: str = "forward", training: bool | None = None, **kwargs: Any
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.method, self.training = method, training

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method: str = "forward",
        training: bool | None = None,
    ) -> Call:
        """The same with arguments that may be named like the call's own.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            method: Name of the method that is called.
            training: Only in train mode (True) or in eval mode (False); None: in both.
        """
        call = cls(*args, method=method, training=training)
        call.kwargs = dict(kwargs)
        return call

    def modes(self) -> tuple[Call, ...]:
        """The call in each mode that it is made in, eval mode first."""
        flags = (False, True) if self.training is None else (self.training,)
        return tuple(Call.of(self.args, self.kwargs, self.method, flag) for flag in flags)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The same call with other arguments.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        return Call.of(args, kwargs, self.method, self.training)

    def __str__(self) -> str:
        given = [short(a) for a in self.args] + [f"{k}={short(v)}" for k, v in self.kwargs.items()]
        mode = {True: " in train mode", False: " in eval mode", None: ""}[self.training]
        return f"{self.method}({', '.join(given)}){mode}"

    __repr__ = __str__


# One call: a tuple is positional arguments, a dict keyword arguments, a tensor the one argument. A list is several.
ExampleCall = tuple[Any, ...] | Mapping[str, Any] | Tensor | Call
ExampleInputs = ExampleCall | list[ExampleCall]


class Arguments(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(given: object) -> Arguments:
    """What a batch or an example passes to a model, as positional and keyword arguments."""
    if isinstance(given, Arguments):
        return given
    if isinstance(given, Call):
        return Arguments(given.args, given.kwargs)
    if isinstance(given, Mapping):
        return Arguments((), dict(given))
    if type(given) in (tuple, list):  # a named tuple, or a packed sequence, is one argument
        return Arguments(tuple(given), {})  # type: ignore[arg-type]
    return Arguments((given,), {})


def calls_of(example_inputs: ExampleInputs | Arguments | Sequence[Call]) -> tuple[Call, ...]:
    """The calls that example inputs stand for, those of `forward` first.

    Raises:
        StructureError: A list is empty, holds something that is no call, or none of `forward`.
    """
    calls = [
        one if isinstance(one, Call) else Call.of(*arguments(one))
        for one in _several(example_inputs)
    ]
    if not any(call.method == "forward" for call in calls):
        raise StructureError(
            f"None of the example calls is of forward ({', '.join(map(str, calls))}). Add one: what the model's own "
            "forward pass does has to be seen."
        )
    return tuple(sorted(calls, key=lambda call: call.method != "forward"))


def _several(example_inputs: object) -> list[Any]:
    if not isinstance(example_inputs, list):
        return [example_inputs]
    help_ = (
        "A list is several calls, each a tensor, a tuple of positional arguments, a dict of keyword arguments, or a "
        "tracker.Call. For one call whose arguments are these, pass a tuple; for a list as the one argument, a tuple "
        "with the list in it."
    )
    if not example_inputs:
        raise StructureError(f"example_inputs is an empty list. {help_}")
    for position, one in enumerate(example_inputs):
        if not isinstance(one, Tensor | tuple | Mapping | Call):
            raise StructureError(
                f"Item {position} of the list example_inputs is of type {type(one).__name__}. {help_}"
            )
    return example_inputs


def short(value: object) -> str:
    """A value of a call, for people: a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__name__

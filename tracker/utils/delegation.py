"""How the facade passes its calls on to its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def call(part: str, method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of a facade that calls this method of the part it keeps under that name.

    Signature and docstring are the part's: they are written once.

    Args:
        part: Name of the facade's attribute.
        method: A method of that attribute's class.

    Returns:
        A function to be made a method of the facade.
    """
    name = method.__name__

    @wraps(method)
    def passed_on(facade: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, getattr(getattr(facade, part), name)(*args, **kwargs))

    return cast(Callable[Concatenate[Any, P], R], passed_on)

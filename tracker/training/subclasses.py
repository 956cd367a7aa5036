"""Classes of the user's own, found by the names that a checkpoint has of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from tracker.errors import SurgeryError

T = TypeVar("T")
PASS_IT = (
    "Make it as you did, and pass it: load_checkpoint(path, model, optimizer, policy=...), or after load_state_dict "
    "start_self_modification(policy)."
)


def name_of(kind: type) -> str:
    """The name by which `subclass_named` finds a class: "module:name"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def subclass_named(name: object, base: type[T]) -> type[T]:
    """A subclass that exists in this process, by "module:name": nothing is imported because a file says so.

    Raises:
        SurgeryError: There is none.
    """
    module, _, own = str(name).partition(":")
    found = [kind for kind in _subclasses(base) if kind.__qualname__ == own]
    # What was run as a script is imported by another name later, or the other way round.
    same = [k for k in found if "__main__" in (module, k.__module__) or k.__module__ == module]
    if not same:
        raise SurgeryError(
            f"The policy is a {name}, a class that does not exist here: import or define it before loading. {PASS_IT}"
        )
    return same[-1]  # of a class that was defined again, the last one


def _subclasses(kind: type[T]) -> Iterator[type[T]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)

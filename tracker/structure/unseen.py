"""Parameters that no example call ran: whether they would read or make a group's units nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from tracker.errors import StructureError
from tracker.structure.trace import Trace
from tracker.structure.units import UnitGroup


def unseen_in(trace: Trace) -> tuple[str, ...]:
    """Names of the parameters that no recorded pass read."""
    return tuple(n for n, _ in trace.model.named_parameters() if n not in trace.read.names)


def owners(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """These parameters by the outermost module of which all parameters are among them; else by their own names."""
    names = list(names)
    among = set(names)
    whole = {
        prefix
        for prefix, module in model.named_modules()
        if prefix
        and (own := [f"{prefix}.{n}" for n, _ in module.named_parameters()])
        and among.issuperset(own)
    }
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        found.setdefault(next((p for p in prefixes if p in whole), name), []).append(name)
    return found


def without(names: Iterable[str], assumed: Collection[str]) -> list[str]:
    """These parameters but those that are assumed to be read by nobody, or lie in modules that are."""
    return [n for n in names if not any(n == a or n.startswith(f"{a}.") for a in assumed)]


def require_known(model: nn.Module, names: Collection[str]) -> None:
    """Refuse names that are assumed to be read by nobody, and that the model does not have.

    Raises:
        StructureError: It has no such module or parameter.
    """
    if isinstance(names, str) or not isinstance(names, Collection):
        raise StructureError(f"assume_unread is a list of names of modules, not {names!r}.")
    known = {*dict(model.named_modules()), *dict(model.named_parameters())} - {""}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3, 0.4) or sorted(known)[:3]
            raise StructureError(
                f"assume_unread names {name!r}, and the model has no such module or parameter. Near: {', '.join(near)}."
            )


def refuse_unseen(
    model: nn.Module, groups: Sequence[UnitGroup], unseen: Iterable[str]
) -> list[UnitGroup]:
    """The groups, not prunable those whose units one of these parameters could read or make, by its sizes."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        shapes.setdefault(name, tuple(tensor.shape))
    wanted = [(owner, name) for owner, names in owners(model, unseen).items() for name in names]
    return [_refused(group, wanted, shapes) if group.prunable else group for group in groups]


def _refused(
    group: UnitGroup, unseen: Sequence[tuple[str, str]], shapes: Mapping[str, Sequence[int]]
) -> UnitGroup:
    extents = {shapes[tensor][dim] for tensor, dim in group.roles}
    met: dict[str, str] = {}
    for owner, name in unseen:
        for dim, size in enumerate(shapes[name]):
            if size > 1 and (size == group.size or any(size % n == 0 for n in extents)):
                met.setdefault(owner, f"{name}[{dim}] has {size} indices")
    if not met:
        return group
    some = ", ".join(list(met)[:4]) + (f" and {len(met) - 4} more" if len(met) > 4 else "")
    first = next(iter(met))
    asked = str(list(met)) if len(met) <= 4 else f"[{first!r}, ...]"
    return replace(
        group,
        prunable=False,
        reason=f"no example call ran {some}, which could read or make these units ({met[first]}): add a call that does "
        f"to example_inputs, or say that none will: track_model(..., assume_unread={asked})",
    )

"""Proposals on trial: units are removed from a copy of the model, and the copy must equal the masked original.

What the rules cannot see (an integer in the model's code, a scale made from a width) shows here, before anyone relies
on it. The model itself is not touched: all is done on copies in float64.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import StructureError
from tracker.probe import Arguments, ExampleInputs, arguments, copy_of, forward_once
from tracker.structure.integers import Choice, Integers, UnsolvableError
from tracker.structure.ints import Attribute
from tracker.structure.sizes import adapt, tensors
from tracker.structure.stream import Forecast, Stream, differing
from tracker.structure.trace import plain_kernels
from tracker.structure.units import Place, UnitGroup

SHARE = 0.3  # of each group's units
TOLERANCE = 1e-9  # relative, in float64: removing what is masked differs by rounding, about 1e-15

# Zero in the units' place: where weights read them, their columns; where other activations do (queries and keys), what
# makes them.
MASKS = (("reads",), ("reads", "produces", "carries"))


def try_groups(
    model: nn.Module,
    example_inputs: ExampleInputs | Arguments,
    groups: Sequence[UnitGroup],
    integers: Integers | None = None,
    forecast: Forecast | None = None,
) -> list[UnitGroup]:
    """The groups, those that failed their trial not prunable, with the reason."""
    integers, forecast = integers or Integers(), forecast or Forecast()
    groups = [_followed(group, integers) for group in groups]
    if not any(g.prunable for g in groups):
        return list(groups)
    bench = vivid(copy_of(model).double())
    inputs = double(arguments(example_inputs))
    failed: dict[str, str] = {}
    with plain_kernels():
        if not is_finite(forward_once(bench, inputs)):
            why = "the model's output on the example inputs is not finite: nothing can be compared"
            return [replace(g, prunable=False, reason=why) if g.prunable else g for g in groups]
        for exact in (True, False):
            for together in _apart([g for g in groups if g.prunable and g.exact is exact]):
                _search(bench, inputs, together, integers, forecast, failed)
    return [
        replace(g, prunable=False, reason=failed[g.name]) if g.name in failed else g for g in groups
    ]


@contextmanager
def removed(
    model: nn.Module, choice: Choice, attributes: Mapping[Attribute, int]
) -> Iterator[None]:
    """Inside, `model` (a copy of the user's) is without these units; afterwards it is as before."""
    with _kept(model):
        held, owners = tensors(model), _owners(model)
        for name, places in _by_tensor(choice).items():
            kept = held[name].detach()
            for dim, lost in places.items():
                keep = [i for i in range(kept.shape[dim]) if i not in lost]
                kept = kept.index_select(dim, torch.tensor(keep, device=kept.device))
            _put(owners, held[name], kept)
        backs: list[Callable[[], None]] = []
        try:
            adapt(model, attributes, backs.append)
            yield
        finally:
            for back in backs:
                back()


@contextmanager
def masked(model: nn.Module, choice: Choice, roles: Collection[str]) -> Iterator[None]:
    """Inside, the slices of these units with one of these roles are zero; afterwards `model` is as before."""
    with _kept(model):
        held, owners = tensors(model), _owners(model)
        blank: dict[str, Tensor] = {}
        for group, units in choice:
            for part in group.all_slices(units):
                if part.role in roles:
                    value = blank.setdefault(part.tensor, held[part.tensor].detach().clone())
                    gone = torch.tensor(part.indices, device=value.device)
                    value.index_fill_(part.dim, gone, 0)
        for name, value in blank.items():
            _put(owners, held[name], value)
        yield


def _followed(group: UnitGroup, integers: Integers) -> UnitGroup:
    """The group, if the integers of the model's code can follow its removal; else why not."""
    if not group.prunable:
        return group
    some = _some(group, torch.Generator().manual_seed(0))
    refusals = [_refusal(group, units, integers) for units in (some, some[:1], some[1:])]
    if not any(refusals):
        return group
    step = integers.step(group) or 1
    if step == 1 and refusals[0]:
        return replace(group, prunable=False, reason=refusals[0])
    return replace(group, multiple_of=step)


def _refusal(group: UnitGroup, units: Sequence[int], integers: Integers) -> str:
    try:
        integers.solve([(group, units)])
    except UnsolvableError as error:
        return f"the model's code does not follow a removal: {error}"
    return ""


def _search(
    model: nn.Module,
    inputs: Any,
    groups: Sequence[UnitGroup],
    integers: Integers,
    forecast: Forecast,
    failed: dict[str, str],
) -> None:
    """All at once; where that fails, by halves, down to the groups that fail alone."""
    if not groups:
        return
    why = _trial(model, inputs, groups, integers, forecast)
    if not why:
        return
    if len(groups) == 1:
        failed[groups[0].name] = why
        return
    half = len(groups) // 2
    before = len(failed)
    _search(model, inputs, groups[:half], integers, forecast, failed)
    _search(model, inputs, groups[half:], integers, forecast, failed)
    if len(failed) == before:  # each half is fine by itself: what they share cannot be told
        for group in groups:
            failed[group.name] = f"it cannot go together with others: {why}"


def _trial(
    model: nn.Module,
    inputs: Any,
    groups: Sequence[UnitGroup],
    integers: Integers,
    forecast: Forecast,
) -> str:
    """Why these groups cannot be removed, or ""."""
    generator = torch.Generator().manual_seed(0)
    choice = [(g, _some(g, generator)) for g in groups]
    try:
        with removed(model, choice, integers.solve(choice)):
            after = Stream(model)
            found = forward_once(model, inputs, within=after)
    except UnsolvableError as error:
        return f"the model's code does not follow a removal: {error}"
    except StructureError as error:
        return f"the model's code does not follow a removal: {_place(error.__cause__)}"
    except Exception as error:
        return f"it could not be removed from a copy: {type(error).__name__}: {error}"
    if not groups[0].exact:  # nothing to compare with: others see the removal, too
        before = Stream(model)
        if _shapes(found) != _shapes(forward_once(model, inputs, within=before)):
            return "the output changes its shape"
        return differing(before, after, forecast, choice, same=False)
    difference = difference_from_mask(model, inputs, choice, found)
    if difference <= TOLERANCE:
        return ""
    return (
        f"without some of its units the output differs from the masked model's by {difference:.1e}: something in the "
        "model's code depends on their number or positions"
    )


def difference_from_mask(
    model: nn.Module,
    inputs: Arguments,
    choice: Choice,
    found: object,
    within: AbstractContextManager[object] | None = None,
) -> float:
    """How far an output is from the masked model's, whose first run is `within` a context.

    Relative to the largest value.
    """
    difference = float("inf")
    for roles in MASKS:
        if difference > TOLERANCE:
            with masked(model, choice, roles):
                expected = forward_once(model, inputs, within)
                within = None
            difference = min(difference, relative_difference(found, expected))
    return difference


def relative_difference(found: object, expected: object) -> float:
    """Largest difference of any two output tensors, relative to the largest expected value; inf if not comparable."""
    a, b = _outputs(found), _outputs(expected)
    if [t.shape for t in a] != [t.shape for t in b] or not b:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.is_floating_point():
            worst = max(worst, float("inf") if not torch.equal(x, y) else 0.0)
        elif x.numel():
            scale = y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
            worst = max(worst, float(((x - y).abs().max() / scale).nan_to_num(torch.inf)))
    return worst


def is_finite(output: object) -> bool:
    """Whether all values of an output are."""
    return all(bool(t.isfinite().all()) for t in _outputs(output) if t.is_floating_point())


def _some(group: UnitGroup, generator: torch.Generator) -> list[int]:
    step = group.multiple_of
    count = max(1, round(SHARE * group.size / step)) * step
    count = min(count, (group.size - 1) // step * step)
    return torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()


def _by_tensor(choice: Choice) -> Mapping[str, dict[int, set[int]]]:
    """Tensor → dimension → indices that go."""
    gone: dict[str, dict[int, set[int]]] = {}
    for group, units in choice:
        for part in group.all_slices(units):
            gone.setdefault(part.tensor, {}).setdefault(part.dim, set()).update(part.indices)
    return gone


def _apart(groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Groups that lie at the same indices (heads and head dimensions) are not tried together."""
    rounds: list[tuple[dict[Place, set[int]], list[UnitGroup]]] = []
    for group in groups:
        lying = {place: {i for unit in group.members for i in unit[place]} for place in group.roles}
        free = (
            room
            for room in rounds
            if all(lies.isdisjoint(room[0].get(place, ())) for place, lies in lying.items())
        )
        room = next(free, None)
        if room is None:
            rounds.append(room := ({}, []))
        taken, members = room
        members.append(group)
        for place, indices in lying.items():
            taken.setdefault(place, set()).update(indices)
    return [members for _, members in rounds]


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Whatever is changed in the modules' own tables inside is put back."""
    modules = list(model.modules())
    saved = [(dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, (values, parameters, buffers) in zip(modules, saved, strict=True):
            vars(module).clear()
            vars(module).update(values)
            for table, before in ((module._parameters, parameters), (module._buffers, buffers)):
                table.clear()
                table.update(before)  # type: ignore[arg-type]


Owners = dict[int, list[tuple[dict[str, Any], str]]]


def _owners(model: nn.Module) -> Owners:
    """Of each parameter and buffer (by id) the tables that hold it, and under which key: ties stay ties."""
    found: Owners = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((table, key))
    return found


def _put(owners: Owners, old: Tensor, new: Tensor) -> None:
    """`new` in place of `old`, for every owner."""
    value: Tensor = new
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(new, requires_grad=False)
    for table, key in owners[id(old)]:
        table[key] = value


def _shapes(value: object) -> list[torch.Size]:
    return [t.shape for t in _outputs(value)]


def vivid(model: nn.Module) -> nn.Module:
    """Constant vectors (norms' ones and zeros) and matrices of zeros would hide a wrong removal: make them random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in model.parameters():
            if matrix.is_floating_point() and matrix.ndim > 1 and not matrix.any():
                width = matrix[0].numel() ** -0.5
                noise = torch.rand(matrix.shape, generator=generator, dtype=matrix.dtype)
                matrix.copy_((2 * noise - 1) * width)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1 and tensor.numel() > 1:
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                noise = noise.to(tensor.device)
                tensor.mul_(0.5 + noise).add_(0.1 * noise)
    return model


def double(inputs: Arguments) -> Arguments:
    """The same arguments, floating-point tensors in float64."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(cast, value))
        return {k: cast(v) for k, v in value.items()} if isinstance(value, dict) else value

    return Arguments(cast(inputs.args), cast(inputs.kwargs))


def shuffled(inputs: Arguments) -> Arguments:
    """Fresh inputs of the same shapes and the same values, in another order: valid tokens stay valid."""
    generator = torch.Generator().manual_seed(0)

    def mix(value: Any) -> Any:
        if isinstance(value, Tensor):
            order = torch.randperm(value.numel(), generator=generator).to(value.device)
            return value.flatten()[order].view(value.shape)
        if isinstance(value, (tuple, list)):
            return type(value)(map(mix, value))
        return {k: mix(v) for k, v in value.items()} if isinstance(value, dict) else value

    return Arguments(mix(inputs.args), mix(inputs.kwargs))


def _outputs(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    parts: Iterable[Any] = value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in _outputs(part)]


def _place(error: BaseException | None) -> str:
    """What was raised, and the line of the model's code (or of torch's, if there is no other) that raised it."""
    if error is None:
        return "unknown"
    frames = traceback.extract_tb(error.__traceback__)
    torch_root = str(Path(torch.__file__).parent) + os.sep
    own = [
        f
        for f in frames
        if not f.filename.startswith(torch_root) and "tracker" not in Path(f.filename).parts
    ]
    frame = (own or list(frames))[-1]
    text = str(error).splitlines()[0] if str(error) else ""
    return (
        f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno}: {frame.line})"
    )

"""Proposals on trial: units are removed from a copy of the model, and the copy must equal the masked original.

What the rules cannot see (an integer in the model's code, a scale made from a width) shows here, before anyone relies
on it. The model itself is not touched: all is done on copies in float64.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tracker.errors import StructureError
from tracker.inputs.calls import Call
from tracker.structure.code_sizes.size_equations import Choice, Integers, UnsolvableError
from tracker.structure.trace import plain_kernels
from tracker.structure.trials.float64_mode import Precision
from tracker.structure.trials.op_stream import Forecast, Stream, differing
from tracker.structure.trials.temporary_copies import (
    InFloat64,
    copy_sharing_storage,
    is_finite,
    randomize_constants,
    relative_difference,
)
from tracker.structure.units import Place, UnitGroup
from tracker.utils.nested import replaced, tensors_in

SHARE = 0.3  # of each group's units
# Of a model that does not run in float64: tolerance by how far its own rounding moves the output, and the loosest that
# still tells a fault from rounding.
ROUNDINGS, LOOSEST = 32, 1e-2


def try_groups(
    model: nn.Module,
    passes: Sequence[Call],
    groups: Sequence[UnitGroup],
    integers: Integers | None = None,
    forecast: Forecast | None = None,
) -> tuple[list[UnitGroup], Precision]:
    """The groups, those that failed their trial not prunable, with the reason; and how closely they were compared.

    passes: Calls that were recorded, each in its mode: all are made without a part of the units.
    """
    integers, forecast = integers or Integers(), forecast or Forecast()
    groups = [_followed(group, integers) for group in groups]
    precision = Precision()
    if not any(g.prunable for g in groups):
        return list(groups), precision
    failed, why = _tried(model, passes, groups, integers, forecast, precision)
    if why and (own := _own_precision(model, passes, why)) is not None:
        precision = own
        failed, _ = _tried(model, passes, groups, integers, forecast, own)
    return [
        replace(g, prunable=False, reason=failed[g.name]) if g.name in failed else g for g in groups
    ], precision


def _tried(
    model: nn.Module,
    passes: Sequence[Call],
    groups: Sequence[UnitGroup],
    integers: Integers,
    forecast: Forecast,
    precision: Precision,
) -> tuple[dict[str, str], str]:
    """Group -> why it cannot go; and why the whole model does not run so, or ""."""
    trial_copy = InFloat64(randomize_constants(copy_sharing_storage(model)), precision.in_float64)
    trial = _Trial(trial_copy, passes, integers, forecast, precision)
    with plain_kernels():
        for exact in (True, False):
            for together in _apart([g for g in groups if g.prunable and g.exact is exact]):
                trial.search(together)
    return trial.failed, trial.why_not_float64


def _own_precision(model: nn.Module, passes: Sequence[Call], why: str) -> Precision | None:
    """How far rounding moves the outputs of a model that runs in its own dtypes only; None if it hides faults.

    Measured: the outputs' answer to weights that are off by the last digit.
    """
    floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for step in (0, eps):
        trial_copy = randomize_constants(copy_sharing_storage(model))
        with torch.no_grad():
            for p in trial_copy.parameters() if step else ():
                if p.is_floating_point():
                    sign = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
                    p.data = p.data * (1 + step * sign)
        try:
            own = InFloat64(trial_copy, in_float64=False)
            with plain_kernels():
                outputs.append([own.run(call) for call in passes])
        except StructureError:
            return None
    moved = max(map(relative_difference, *outputs))
    tolerance = ROUNDINGS * max(moved, eps)
    return Precision(False, tolerance, why) if tolerance <= LOOSEST else None


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


@dataclass(slots=True)
class _Trial:
    """Groups of one model, tried one after the other or together."""

    model: InFloat64
    passes: Sequence[Call]
    integers: Integers
    forecast: Forecast
    precision: Precision
    failed: dict[str, str] = field(default_factory=dict)  # group → why
    why_not_float64: str = ""  # where the whole model does not run
    # Why the whole model can be compared with nothing, or "", once it was asked.
    _whole: str | None = None

    def search(self, groups: Sequence[UnitGroup]) -> None:
        """All at once; where that fails, by halves, down to the groups that fail alone."""
        if not groups or not (why := self._of(groups)):
            return
        if whole := self._of_whole():
            self.failed |= {group.name: whole for group in groups}
            return
        if len(groups) == 1:
            self.failed[groups[0].name] = why
            return
        half = len(groups) // 2
        before = len(self.failed)
        self.search(groups[:half])
        self.search(groups[half:])
        if (
            len(self.failed) == before
        ):  # each half is fine by itself: what they share cannot be told
            why = f"it cannot go together with others: {why}"
            self.failed |= {group.name: why for group in groups}

    def _of(self, groups: Sequence[UnitGroup]) -> str:
        """Why these groups cannot be removed, or ""."""
        generator = torch.Generator().manual_seed(0)
        choice = [(g, _some(g, generator)) for g in groups]
        streams = [Stream(self.model.model) for _ in self.passes]
        try:
            with self.model.removed(choice, self.integers.solve(choice)):
                found = [
                    self.model.run(call, within=after)
                    for call, after in zip(self.passes, streams, strict=True)
                ]
        except UnsolvableError as error:
            return f"the model's code does not follow a removal: {error}"
        except StructureError as error:
            return f"the model's code does not follow a removal: {_place(error.__cause__)}"
        except Exception as error:
            return f"it could not be removed from a copy: {type(error).__name__}: {error}"
        compare = self._from_masked if groups[0].exact else self._from_whole
        reasons = (compare(n, choice, found[n], streams[n]) for n in range(len(found)))
        return next(filter(None, reasons), "")

    def _from_masked(self, number: int, choice: Choice, found: object, _: Stream) -> str:
        """What a pass without units does otherwise than the masked model, or ""."""
        call = self.passes[number]
        if not is_finite(found):
            return f"without some of its units the output{_of(call)} is not finite"
        tolerance = self.precision.tolerance
        difference = self.model.difference_from_mask(call, choice, found, tolerance=tolerance)
        if difference <= tolerance:
            return ""
        return (
            f"without some of its units the output{_of(call)} differs from the masked model's by {difference:.1e}: "
            "something in the model's code depends on their number or positions"
        )

    def _from_whole(self, number: int, choice: Choice, found: object, after: Stream) -> str:
        """The same where there is nothing to compare with: others see the removal, too."""
        call, before = self.passes[number], Stream(self.model.model)
        if not is_finite(found):
            return f"without some of its units the output{_of(call)} is not finite"
        if _shapes(found) != _shapes(self.model.run(call, within=before)):
            return f"the output{_of(call)} changes its shape"
        return differing(before, after, self.forecast, choice, same=False, number=number)

    def _of_whole(self) -> str:
        """Why the whole model does not run in float64, or gives nothing to compare with, or ""."""
        if self._whole is None:
            try:
                finite = all(is_finite(self.model.run(call)) for call in self.passes)
                why = "the model's output on the example inputs is not finite: nothing can be compared"
                self._whole = "" if finite else why
            except StructureError as error:
                self.why_not_float64 = _place(error.__cause__)
                self._whole = f"a copy of the model does not run in float64: {self.why_not_float64}"
        return self._whole


def _some(group: UnitGroup, generator: torch.Generator) -> list[int]:
    step = group.multiple_of
    count = max(1, round(SHARE * group.size / step)) * step
    count = min(count, (group.size - 1) // step * step)
    return torch.randperm(group.size, generator=generator)[:count].sort().values.tolist()


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


def _shapes(value: object) -> list[torch.Size]:
    return [t.shape for t in tensors_in(value)]


def _of(call: Call) -> str:
    """The pass, for people, where it is no plain one."""
    return "" if call.method == "forward" and not call.training else f" of {call}"


def shuffled(call: Call) -> Call:
    """Fresh inputs of the same shapes and the same values, in another order: valid tokens stay valid."""
    generator = torch.Generator().manual_seed(0)

    def mix(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].view(tensor.shape)

    return call.given(*replaced((call.args, call.kwargs), mix))


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

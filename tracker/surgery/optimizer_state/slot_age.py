"""The first steps of new slots: an optimizer of Adam's kind corrects the bias of their moments by their own age.

Torch keeps one step count for a whole parameter. Fresh moments of zero under an old count have no bias correction,
and move a new slot up to 6.5 times too far. So each slot's age is kept in the optimizer's state (it moves, saves and
loads with it), and after a step the displacement of young slots is scaled to what their own age allows. The correction
at age k is c(k) = √(1 − β₂ᵏ) / (1 − β₁ᵏ) (Kingma & Ba, 2015, section 3); torch made that of the whole parameter's count
t, so that c(k) / c(t) is left, warmed up over the first steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.utils.slotmap import SlotMap

AGE = "slot_age"
MATURE_STEPS = 10_000  # age of slots of which nothing is corrected any more
WARM_UP = 100
HEAD_START = 30  # steps; with 0 new units fall silent at a rate of 3e-3, with 100 they learn too slowly at 1e-3
NEGLIGIBLE = 0.01  # part of a step that is not worth a correction

Slots = Tensor | range | None  # along a dimension; None: all


def aged(
    optimizer: Optimizer, state: Mapping[str, Any], parameter: Tensor, slots: Mapping[int, SlotMap]
) -> dict[str, Any]:
    """State to add for a parameter of which some slots are fresh; nothing for optimizers without bias correction."""
    fresh = {dim: s for dim, s in slots.items() if None in s.source}
    if not fresh or "exp_avg" not in state or "betas" not in optimizer.defaults:
        return {}
    if isinstance(state.get(AGE), Tensor):
        return {}  # moves with the rest, fresh slots at zero
    shape = [slots[d].size if d in slots else n for d, n in enumerate(parameter.shape)]
    age = torch.full(shape, float(MATURE_STEPS), device=parameter.device)
    for dim, change in fresh.items():
        young = [i for i, s in enumerate(change.source) if s is None]
        age.index_fill_(dim, torch.tensor(young, device=age.device), 0.0)
    return {AGE: age}


def head_start(optimizer: Optimizer, parameter: Tensor) -> tuple[float, float]:
    """The age at which slots begin that inherit the others' second moments, and which part of these they then have.

    After k steps a second moment that began at zero holds the part 1 − β₂ᵏ of what it tends to.
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if "betas" not in group:
        return math.inf, 1.0
    beta2 = float(group["betas"][1])
    count = float(optimizer.state[parameter].get("step", MATURE_STEPS))
    age = min(float(HEAD_START), count)
    return age, (1 - beta2**age) / (1 - beta2 ** max(count, 1.0))


def watch(optimizer: Optimizer) -> None:
    """Correct the steps of young slots from now on; once per optimizer."""
    if not any(isinstance(h, _Before) for h in optimizer._optimizer_step_pre_hooks.values()):
        before = _Before()
        optimizer.register_step_post_hook(_After(before))  # alone it does nothing
        optimizer.register_step_pre_hook(before)


class _Before:
    """Keeps the values of young slots, for the time of one step."""

    def __init__(self) -> None:
        self.young: dict[nn.Parameter, _Young] = {}
        self.under_way: list[_Young] = []

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.under_way, known = [], self.young
        self.young = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, ())
                if AGE in state:
                    mine = known.get(parameter)
                    if mine is None or mine.age is not state[AGE] or mine.grown_up:
                        mine = _Young(parameter, state, group["betas"])
                        if mine.grown_up:
                            del state[AGE]
                            continue
                    self.young[parameter] = mine
                    # Whether it gets a gradient is known later, where the step runs a closure.
                    mine.keep()
                    self.under_way.append(mine)


class _After:
    def __init__(self, before: _Before) -> None:
        self._before = before

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        under_way, self._before.under_way = self._before.under_way, []
        for each in under_way:
            if each.moves:
                each.correct()


class _Young:
    """The young slots of one parameter: whole rows and columns of it, since slots are born whole.

    What a step costs is proportional to them alone. A sharded parameter is taken as a whole.
    """

    def __init__(self, parameter: Any, state: dict[str, Any], betas: tuple[float, float]) -> None:
        # Loading a state gives it the parameter's dtype, and bfloat16 cannot count beyond 256.
        self.age = state[AGE] = _placed(state[AGE], parameter).float()
        self._parameter = parameter
        self._table, self._plain, self._warmed = _corrections(float(betas[0]), float(betas[1]))
        self._at_device = self._table.to(self.age.device)
        self._steps = int(state.get("step", MATURE_STEPS))  # that the optimizer counts
        self._since = 0  # of them, how many this has seen
        self._parts: list[tuple[int, Slots]] = []  # dimension, and slots along it
        # The ages of a part's slots, or of its elements where these differ, when this was made.
        self._ages: list[Tensor] = []
        self._oldest: list[int] = []  # of a part
        self._values: list[Tensor] = []
        # What is mature now stays so, though the count by which it is goes on.
        mature = self._mature()
        self.age = state[AGE] = torch.where(
            self.age < mature, self.age, torch.full_like(self.age, float(MATURE_STEPS))
        )
        # A rank that holds none of the young slots keeps their ages as long as the others do.
        age: Any = self.age
        whole = age.full_tensor() if hasattr(parameter, "placements") else age
        self._youngest = int(whole.min())
        if self._youngest < mature:
            self._divide(whole < mature, sharded=hasattr(parameter, "placements"))

    def _divide(self, young: Tensor, *, sharded: bool) -> None:
        rest = young
        for dim in range(young.ndim) if not sharded else ():
            slots = young.movedim(dim, 0).reshape(young.shape[dim], -1).all(1).nonzero().flatten()
            if len(slots) and bool(rest.any()):
                ages = self.age.index_select(dim, slots)
                each = ages.movedim(dim, 0).reshape(len(slots), -1)[:, 0]
                each = each.view([-1 if d == dim else 1 for d in range(young.ndim)])
                self._parts.append((dim, _in_a_row(slots)))
                self._ages.append((each if bool((ages == each).all()) else ages).long())
                self._oldest.append(int(ages.max()))
                rest = rest.index_fill(dim, slots, False)
        if sharded or bool(rest.any()):
            # Not of whole slots, or not here alone.
            self._parts, self._oldest = [(0, None)], [MATURE_STEPS]
            self._ages = [self.age.clone() if sharded else self.age.long()]

    @property
    def grown_up(self) -> bool:
        """Whether nothing is left to correct."""
        at = min(self._youngest + self._since, MATURE_STEPS)
        factor = self._warmed[at] / self._whole()
        return at >= MATURE_STEPS or (at >= WARM_UP and abs(factor - 1) <= NEGLIGIBLE)

    @property
    def moves(self) -> bool:
        """Whether the optimizer had a gradient to step along."""
        return self._parameter.grad is not None

    def keep(self) -> None:
        """Before the step."""
        parts = [_part(self._parameter.detach(), *at) for at in self._parts]
        pairs = zip(parts, self._parts, strict=True)
        self._values = [p if isinstance(slots, Tensor) else p.clone() for p, (_, slots) in pairs]

    def correct(self) -> None:
        """After it. Where rows and columns cross, both are written with the same values."""
        parameter = self._parameter.detach()
        self._since, self._steps = self._since + 1, self._steps + 1
        factors = [self._factors(n).to(parameter.dtype) for n in range(len(self._parts))]
        if len(self._parts) == 1 and not isinstance(self._parts[0][1], Tensor):
            self._correct_in_place(parameter, factors[0])
        else:
            pairs = zip(self._values, self._parts, factors, strict=True)
            new = [_between(old, _part(parameter, *at), factor) for old, at, factor in pairs]
            for at, age, values in zip(self._parts, self._ages, new, strict=True):
                _put(parameter, *at, values)
                _put(self.age, *at, (age + self._since).to(self.age.dtype).expand_as(values))
        self._values = []

    def _correct_in_place(self, parameter: Tensor, factor: Tensor) -> None:
        """The same of a single part that is a view: most steps of most parameters are of this kind."""
        (old,), after = self._values, _part(parameter, *self._parts[0])
        if hasattr(old, "placements"):
            after.copy_(_between(old, after, factor))
        else:
            torch.lerp(old, after, factor, out=after)
        _part(self.age, *self._parts[0]).add_(1.0)

    def _whole(self) -> float:
        """The correction that the optimizer made of the step before, by its own count."""
        return self._plain[min(max(self._steps, 1), MATURE_STEPS)]

    def _mature(self) -> int:
        """The age from which on a correction is negligible."""
        left = (self._table[: self._steps + 1] / self._whole() - 1).abs() > NEGLIGIBLE
        return int(left.nonzero().max()) + 1

    def _factors(self, part: int) -> Tensor:
        """Of each of a part's slots, or elements: which share of the step is its own."""
        age = self._ages[part]
        if self._oldest[part] + self._since < MATURE_STEPS:
            return self._at_device[self._since :][age] / self._whole()
        if not hasattr(age, "placements"):
            return self._clamped(age)
        from torch.distributed.tensor import DTensor

        whole: Any = age
        own = self._clamped(whole.to_local().long())
        return DTensor.from_local(
            own, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
        )

    def _clamped(self, age: Tensor) -> Tensor:
        """The same where some are mature, or become so."""
        at = (age + self._since).clamp(max=MATURE_STEPS)
        found = self._at_device[at] / self._whole()
        return found.masked_fill_(at == MATURE_STEPS, 1.0)


def _in_a_row(slots: Tensor) -> Slots:
    """As a range where they are one: it is read and written without an index."""
    first, last = int(slots[0]), int(slots[-1])
    return range(first, last + 1) if last + 1 - first == len(slots) else slots


def _part(tensor: Tensor, dim: int, slots: Slots) -> Tensor:
    """A copy where slots are a tensor, else a view."""
    if isinstance(slots, Tensor):
        return tensor.index_select(dim, slots)
    return tensor if slots is None else tensor.narrow(dim, slots.start, len(slots))


def _put(tensor: Tensor, dim: int, slots: Slots, values: Tensor) -> None:
    if isinstance(slots, Tensor):
        tensor.index_copy_(dim, slots, values)
    else:
        _part(tensor, dim, slots).copy_(values)


def _between(old: Tensor, after: Tensor, factor: Tensor) -> Tensor:
    """The value at so much of a step; at 1 exactly that after it."""
    if hasattr(old, "placements"):
        return torch.where(factor == 1, after, old + (after - old) * factor)
    return torch.lerp(old, after, factor)


def _placed(age: Tensor, parameter: Any) -> Tensor:
    """Ages of a parameter that was sharded since: sharded like it. Loading a state leaves them whole."""
    if not hasattr(parameter, "placements") or hasattr(age, "placements"):
        return age
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(age, parameter.device_mesh, parameter.placements)
    return placed


@functools.cache
def _corrections(beta1: float, beta2: float) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
    """By age up to MATURE_STEPS: warmed up, as a float32 tensor; the same as numbers, plain and warmed up."""
    age = torch.arange(MATURE_STEPS + 1, dtype=torch.float64).clamp(min=1)
    plain = (1 - beta2**age).sqrt() / (1 - beta1**age)
    warmed = (plain * (age / WARM_UP).clamp(max=1)).float()
    return warmed, tuple(plain.float().tolist()), tuple(warmed.tolist())

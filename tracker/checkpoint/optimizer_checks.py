"""Is a saved state what an optimizer would have made? Told by steps of it over tiny parameters.

Fused steps do not look at the shapes and types of their state: what does not fit is read and written beyond its end.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.errors import CheckpointError
from tracker.surgery.optimizer_state.slot_age import AGE

PRIMES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
)  # sizes of the dimensions of a tiny parameter: each is known by its size
State = Mapping[str, Any]
Key = tuple[Any, ...]


class StateCheck:
    """Compares states of one optimizer's parameters with what its own step makes."""

    def __init__(self, optimizer: Optimizer, name: str) -> None:
        self._optimizer, self._name = optimizer, name
        self._made: dict[Key, State | None] = {}
        self._taken: dict[Key, str] = {}

    def require_options(
        self, options: Mapping[str, Any], own: Mapping[str, Any], parameter: nn.Parameter
    ) -> None:
        """Refuse options of a group with which no step over this parameter can be made, if one can with its `own`.

        Raises:
            CheckpointError: None can.
        """
        sizes = _tiny(parameter.shape)
        if self._first(options, parameter, sizes) is not None:
            return
        if self._first(own, parameter, sizes) is not None:
            problem = self._step(options, parameter, sizes, {})[1]
            raise CheckpointError(
                f"With the options that were saved the {self._name} cannot make a step: {problem}."
            )

    def _first(
        self, options: Mapping[str, Any], parameter: nn.Parameter, sizes: tuple[int, ...]
    ) -> State | None:
        """What a first step makes; None if it cannot be made."""
        # Of one kind, however large: options are the same objects for all parameters of a group.
        kind = (id(options), sizes, parameter.dtype, parameter.device)
        if kind not in self._made:
            self._made[kind] = self._step(options, parameter, sizes, {})[0]
        return self._made[kind]

    def require(
        self, options: Mapping[str, Any], parameter: nn.Parameter, state: State, name: str
    ) -> None:
        """Refuse the state of a parameter in a group of these options.

        Raises:
            CheckpointError: The optimizer would not have made it, or cannot make a step from it.
        """
        own = {key: value for key, value in state.items() if key != AGE}
        if AGE in state:
            self._fits(state[AGE], parameter.shape, (torch.float32, parameter.dtype), AGE, name)
        if not own:
            return
        sizes = _tiny(parameter.shape)
        made = self._first(options, parameter, sizes)
        for key, value in own.items():
            self._compare(key, value, made, parameter, name)
        kind = (id(options), sizes, parameter.dtype, parameter.device)
        keys = (*kind, *((key, _number(value)) for key, value in sorted(own.items())))
        if keys not in self._taken:
            tiny = {k: _shrunk(v, parameter.shape, sizes) for k, v in own.items()}
            self._taken[keys] = (
                "" if made is None else self._step(options, parameter, sizes, tiny)[1]
            )
        if self._taken[keys]:
            raise CheckpointError(
                f"From its state of {name} the {self._name} cannot make a step: {self._taken[keys]}."
            )

    def _compare(
        self, key: str, value: Any, made: State | None, parameter: nn.Parameter, name: str
    ) -> None:
        same = (parameter.dtype, torch.float32)
        expected = None if made is None else made.get(key)
        if not isinstance(value, Tensor):
            if isinstance(expected, Tensor):
                raise CheckpointError(f"The optimizer's {key} of {name} is no tensor.")
        elif isinstance(expected, Tensor):
            shape = _grown(expected.shape, parameter.shape)
            dtypes: tuple[torch.dtype, ...] = (expected.dtype,)
            if expected.ndim == 0 and expected.is_floating_point():
                dtypes = (torch.float32, torch.float64, parameter.dtype)
            self._fits(value, shape, dtypes, key, name)
            if shape == () and not bool(value.isfinite()):
                raise CheckpointError(f"The optimizer's {key} of {name} is {value.item()!r}.")
        elif (
            made is not None or value.ndim
        ):  # one that an earlier option needed, or of a step that tells nothing
            whole = tuple(parameter.shape)
            known = type(self._optimizer).__module__.startswith("torch.optim")
            if known or made is not None:
                self._fits(value, whole, same, key, name)

    def _fits(
        self, value: Any, shape: Sequence[int], dtypes: Sequence[torch.dtype], key: str, name: str
    ) -> None:
        if (
            not isinstance(value, Tensor)
            or tuple(value.shape) != tuple(shape)
            or value.dtype not in dtypes
        ):
            told = (
                f"{tuple(value.shape)} {value.dtype}"
                if isinstance(value, Tensor)
                else repr(value)[:40]
            )
            raise CheckpointError(
                f"The optimizer's {key} of {name} is {told}, and not {tuple(shape)} {dtypes[0]}."
            )

    def _step(
        self, options: Mapping[str, Any], like: Tensor, sizes: tuple[int, ...], state: State
    ) -> tuple[State | None, str]:
        """The state after a step over a tiny parameter, and what went wrong."""
        with torch.inference_mode(False), torch.enable_grad():
            tiny = nn.Parameter(torch.zeros(sizes, dtype=like.dtype, device=like.device))
            problem = ""
            for sparse in (False, True):
                trial = copy.copy(self._optimizer)
                vars(trial).update(vars(self._optimizer))
                vars(trial).pop(
                    "step", None
                )  # as a scheduler wraps it: it would step the optimizer itself
                hooks: Any = trial
                hooks._optimizer_step_pre_hooks = OrderedDict()
                hooks._optimizer_step_post_hooks = OrderedDict()
                trial.state = defaultdict(dict)
                if state:
                    trial.state[tiny] = {
                        k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()
                    }
                trial.param_groups = [{**options, "params": [tiny]}]
                tiny.grad = (
                    torch.full_like(tiny, 0.5).to_sparse() if sparse else torch.full_like(tiny, 0.5)
                )
                try:
                    trial.step()
                except Exception as error:
                    problem = problem or f"{type(error).__name__}: {error}"
                else:
                    return dict(trial.state[tiny]), ""
            return None, problem


def _number(value: Any) -> Any:
    """A state that is one number; of others it is enough that they have the right shape and type."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return value


def _tiny(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(p if n > 1 else n for n, p in zip(shape, PRIMES, strict=False))


def _grown(shape: Sequence[int], whole: Sequence[int]) -> tuple[int, ...]:
    """A tiny state's shape, of a parameter of this shape."""
    sizes = dict(zip(PRIMES, whole, strict=False))
    return tuple(sizes.get(n, n) for n in shape)


def _shrunk(value: Any, whole: Sequence[int], sizes: Sequence[int]) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if value.shape == torch.Size(whole):
        return torch.zeros(tuple(sizes), dtype=value.dtype, device=value.device)
    small = [
        min(n, sizes[d]) if d < len(sizes) and n == whole[d] else n
        for d, n in enumerate(value.shape)
    ]
    return torch.zeros(small, dtype=value.dtype, device=value.device)

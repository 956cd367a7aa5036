"""Models of the zoo, traced once, and what tests of structure ask of groups."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import (
    masked_copy,
    prune_copy,
    randomise,
    relative_difference,
    run,
)
from tests.zoo import ZOO, Entry
from tracker.structure import trace_structure

TOLERANCE = 1e-6


def models(choose: Callable[[Entry], bool] = lambda entry: True) -> pytest.MarkDecorator:
    params = [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if entry.slow else [])
        for name, entry in ZOO.items()
        if choose(entry)
    ]
    return pytest.mark.parametrize("name", params)


def fresh(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model = randomise(ZOO[name].build(), seed)
    return model.eval(), ZOO[name].inputs()


@functools.cache
def traced(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    """Shared by the tests, none of which changes the model."""
    model, inputs = fresh(name)
    return model, inputs, trace_structure(model, inputs)


def pick(group: Any, name: str, share: float = 0.3) -> list[int]:
    """About that share of the units, as many at a time as the group wants; at least one stays."""
    step = max(1, group.multiple_of)
    count = max(1, round(share * group.size / step)) * step
    count = min(count, (group.size - 1) // step * step)
    return sorted(random.Random(f"{name}/{group.name}").sample(range(group.size), count))


def slices_of(group: Any) -> list[Any]:
    return list(group.slices(tuple(range(group.size))))


def lies_on(group: Any, axes: Iterable[tuple[str, int]]) -> bool:
    return bool({(piece.tensor, piece.dim) for piece in slices_of(group)} & {*axes})


def equals_masked(model: nn.Module, inputs: Any, group: Any, units: list[int]) -> float:
    """How far removal is from the masked model, relative to the output."""
    pruned = run(prune_copy(model, group, units), inputs)
    return min(
        relative_difference(pruned, run(masked_copy(model, group, units, silence=silence), inputs))
        for silence in (False, True)
    )


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that tracing could disturb."""
    hooks = [
        sum(len(held) for key, held in vars(module).items() if "hooks" in key and held)
        for module in model.modules()
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    attributes = [
        {key: (type(value), value) for key, value in vars(module).items() if _plain(value)}
        for module in model.modules()
    ]
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "storages": {key: value.data_ptr() for key, value in parameters.items()},
        "gradients": {key: value.grad for key, value in parameters.items()},
        "flags": {key: value.requires_grad for key, value in parameters.items()},
        "training": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "attributes": attributes,
        "hooks": hooks,
        "rng": torch.get_rng_state(),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, int | float | str | bool | None)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b

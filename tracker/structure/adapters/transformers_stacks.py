"""Blocks that know their place in a stack, and configurations that count and list them, as caches are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

# By these names blocks know their place, and configurations how many there are, and of which kinds.
INDEX, COUNT, KINDS = "layer_idx", "num_hidden_layers", "layer_types"
CONFIGS = (("config",), ("config", "text_config"))


def places(model: nn.Module) -> int:
    """Places in the stack that are taken: the highest index of a block, and one."""
    return 1 + max(_indices(model), default=-1)


def config_of(model: nn.Module, path: Sequence[str]) -> Any:
    """The configuration at the end of a path of names, or None."""
    found: Any = model
    for name in path:
        found = vars(found).get(name) if found is not None else None
    return found


def count_name(config: Any) -> str:
    """The name by which a configuration counts its blocks."""
    name: str = getattr(config, "attribute_map", {}).get(COUNT, COUNT)
    return name


def list_kinds(model: nn.Module) -> None:
    """In configurations that list the kinds of their blocks, list those of blocks that were inserted since.

    One is of the kind of the block that it stands behind, and inside.
    """
    for path in CONFIGS:
        config = config_of(model, path)
        kinds = None if config is None else vars(config).get(KINDS)
        count = None if config is None else vars(config).get(count_name(config))
        if not isinstance(kinds, list) or type(count) is not int or not 0 < len(kinds) < count:
            continue
        kinds = list(kinds)
        while len(kinds) < count and (origin := _origin(model, len(kinds))) is not None:
            kinds.append(kinds[origin])
        vars(config)[KINDS] = kinds


def _indices(module: nn.Module) -> list[int]:
    return [i for m in module.modules() if type(i := vars(m).get(INDEX)) is int]


def _origin(model: nn.Module, place: int) -> int | None:
    """The place of the block inside which the block with this place was inserted."""
    inside = [n for n, m in model.named_modules() if vars(m).get(INDEX) == place]
    path = inside[0] if inside else ""
    while path := path.rpartition(".")[0]:
        earlier = [i for i in _indices(model.get_submodule(path)) if i < place]
        if earlier:
            return min(earlier)
    return None

"""Lists of blocks as they would have been built: copies stand in the list, what was removed does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tracker.errors import SurgeryError
from tracker.structure.adapters.transformers_stacks import (
    CONFIGS,
    INDEX,
    KINDS,
    config_of,
    count_name,
)
from tracker.surgery.inserted_modules import INSERTED, Bypass


def write_out_stacks(model: nn.Module, *, drop: bool) -> None:
    """Put copies of blocks behind their blocks, in the list that holds them; with `drop`, leave removed ones out.

    Places in the stack (for caches) are counted anew, and configurations count and list the blocks that there are.

    Raises:
        SurgeryError: A block with a copy stands in no list.
    """
    for parent in list(model.modules()):
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            _write_out(model, parent, drop and isinstance(parent, nn.ModuleList))
    for name, module in model.named_modules():
        if INSERTED in module._modules and not isinstance(module, nn.Linear | _ConvNd):
            raise SurgeryError(
                f"The block {name!r} has a copy behind it and stands in no list of blocks: no ordinary module runs "
                "both. Remove the copy first, or use save_checkpoint and apply_journal."
            )


def _write_out(model: nn.Module, parent: Any, drop: bool) -> None:
    named = [(key, part) for key, child in parent._modules.items() for part in _with_copies(child)]
    before = [part for _, part in named]
    kept = [(key, m) for key, m in named if not (drop and _is_nothing(m))]
    after = [m for _, m in kept]
    if [id(m) for m in after] == [id(m) for m in parent] or not after:
        return
    for module in before:
        if not isinstance(module, nn.Linear | _ConvNd):
            module._modules.pop(INSERTED, None)
    parent._modules.clear()
    for i, (key, module) in enumerate(kept):
        name = str(i) if key.isdigit() else key
        while name in parent._modules:
            name += "_copy"
        parent._modules[name] = module
    places = [next(_places(m), None) for m in after]
    if any(place is None for place in places):
        return
    for position, module in enumerate(after):
        for part in module.modules():
            if type(vars(part).get(INDEX)) is int:
                vars(part)[INDEX] = position
    for path in CONFIGS:
        config = config_of(model, path)
        count = None if config is None else vars(config).get(count_name(config))
        if count == len(before):
            kinds = vars(config).get(KINDS)
            vars(config)[count_name(config)] = len(after)
            if isinstance(kinds, list) and len(kinds) == count:
                vars(config)[KINDS] = [kinds[place] for place in places if place is not None]


def _with_copies(block: nn.Module) -> Iterator[nn.Module]:
    yield block
    if not isinstance(block, nn.Linear | _ConvNd) and (copy := block._modules.get(INSERTED)):
        yield from _with_copies(copy)


def _places(block: nn.Module) -> Iterator[int]:
    return (i for m in block.modules() if type(i := vars(m).get(INDEX)) is int)


def _is_nothing(module: nn.Module) -> bool:
    return isinstance(module, Bypass) and (module.scale, module.shift) == (1, 0)

"""How a model differs from one that its class makes of its configuration, and a modelling file that makes up for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import ExportError

MODULE = "modeling_uneven"
_PLAIN = (bool, int, float, str, type(None))
# A linear layer's own are those of its weight.
_OF_LINEAR = ("in_features", "out_features")

_FILE = '''"""{name} with layers of unequal widths; `config.json` lists them under "uneven".

Needs only torch and transformers. Load it with trust_remote_code=True.
"""

import torch
from torch import nn
from transformers import {name}


class Uneven{name}({name}):
    """Made as {name} is, and then each tensor is given the size that the configuration lists."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for tensor, shape in config.uneven["shapes"].items():
            place, _, own = tensor.rpartition(".")
            module = self.get_submodule(place)
            old = getattr(module, own)
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            nn.init.normal_(new, std=getattr(config, "initializer_range", 0.02))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, own, new)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        for place, values in config.uneven["attributes"].items():
            for own, value in values.items():
                setattr(self.get_submodule(place), own, value)
        self.tie_weights()
'''


@dataclass(frozen=True, slots=True)
class Uneven:
    """What a model has otherwise than its configuration says.

    Attributes:
        shapes: Of tensors, by their names.
        attributes: Numbers that modules keep of their sizes, by module and name.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        return {"shapes": self.shapes, "attributes": self.attributes}


def modelling_file(kind: type) -> str:
    """The source of a module that makes models of this class with layers of unequal widths."""
    return _FILE.format(name=kind.__name__)


def compared_with_configuration(model: Any) -> Uneven:
    """What of a model its class does not make of its configuration.

    Raises:
        ExportError: The model has other modules or tensors, or others are tied: sizes alone do not tell it.
    """
    with torch.random.fork_rng(devices=[]):
        fresh = type(model)(copy.deepcopy(model.config))
    name = type(model).__name__
    _require_same_parts(model, fresh, name)
    mine, theirs = dict(_tensors(model)), dict(_tensors(fresh))
    shapes = {n: list(t.shape) for n, t in mine.items() if t.shape != theirs[n].shape}
    saved = set(model.state_dict())
    for n, t in mine.items():
        if n not in saved and (n in shapes or not torch.equal(t.cpu(), theirs[n].to(t.dtype))):
            raise ExportError(
                f"The buffer {n} of {name} is not what the class makes of the configuration, and files of the model "
                "do not hold it."
            )
    return Uneven(shapes, _attributes(model, fresh))


def _require_same_parts(model: nn.Module, fresh: nn.Module, name: str) -> None:
    own = {n: type(m) for n, m in model.named_modules()}
    made = {n: type(m) for n, m in fresh.named_modules()}
    for place in sorted({*own, *made}):
        if own.get(place) is not made.get(place):
            has = getattr(own.get(place), "__name__", "nothing")
            gets = getattr(made.get(place), "__name__", "nothing")
            raise ExportError(
                f"At {place!r} the model has {has}, and a {name} of its configuration {gets}: what was inserted, "
                "removed or replaced there stands in no configuration. Take it back, or export to ONNX."
            )
    mine, theirs = dict(_tensors(model)), dict(_tensors(fresh))
    odd = sorted({*mine} ^ {*theirs})
    if odd:
        raise ExportError(
            f"Only one of the model and a {name} of its configuration has {odd[0]}: sizes alone do not tell it."
        )
    if _ties(mine) != _ties(theirs):
        raise ExportError(
            f"In the model other tensors are one than in a {name} of its configuration: {_ties(mine)} and "
            f"{_ties(theirs)}. Say so in the configuration (tie_word_embeddings)."
        )


def _attributes(model: nn.Module, fresh: nn.Module) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for place, module in model.named_modules():
        made = vars(fresh.get_submodule(place))
        for key, value in vars(module).items():
            if key.startswith("_") or key == "training" or key not in made:
                continue
            if isinstance(module, nn.Linear) and key in _OF_LINEAR:
                continue
            if _is_plain(value) and _is_plain(made[key]) and value != made[key] and place:
                found.setdefault(place, {})[key] = value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _ties(tensors: dict[str, Tensor]) -> list[list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_id.setdefault(id(tensor), []).append(name)
    return sorted(names for names in by_id.values() if len(names) > 1)

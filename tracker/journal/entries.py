"""The journal: every change of a model, as plain data from which it can be done again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import nn

from tracker.errors import CheckpointError
from tracker.slotmap import SlotMap
from tracker.structure.ints import Attribute
from tracker.structure.sizes import tensors
from tracker.surgery.apply import apply
from tracker.surgery.depth import Bypass, ReluIdentity, ResidualBlock
from tracker.surgery.plan import Plan
from tracker.surgery.receipt import Receipt
from tracker.surgery.undo import UndoLog

SCHEMA_VERSION = 1
OPERATIONS = (
    "prune_units", "merge_neurons", "expand_layer", "recycle_neurons", "insert_layer", "remove_layer", "compress",
)  # fmt: skip
LAYERS = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
WIDEST = 2**24  # slots of an axis, at most: a larger claim is not believed


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: what it was, what it promised, and its structural part."""

    operation: str
    time: str
    promise: str
    output_difference: float | None
    removed_ids: tuple[int, ...]
    added_ids: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    before: str  # fingerprints of the model's shapes
    after: str
    slots: Mapping[str, Mapping[int, SlotMap]]
    attributes: Mapping[Attribute, int]
    modules: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, plan: Plan, receipt: Receipt, before: str, after: str) -> Entry:
        """The entry of a change that was made."""
        return cls(
            plan.operation,
            datetime.now().astimezone().isoformat(timespec="seconds"),
            receipt.promise,
            receipt.output_difference,
            tuple(receipt.removed_ids),
            tuple(receipt.added_ids),
            receipt.parameters_before,
            receipt.parameters_after,
            before,
            after,
            plan.tensors,
            plan.attributes,
            {name: _described(module) for name, module in plan.modules.items()},
        )

    def replay(self, model: nn.Module) -> UndoLog:
        """Change the shapes of a model in this way once more; fresh content is zero.

        Raises:
            CheckpointError: The model is not the one that was changed.
        """
        if fingerprint(model) != self.before:
            raise CheckpointError(
                f"The journal does not fit this model: before {self.operation} its tensors had other names or shapes. "
                "Build the model with the code and the sizes that it had at first."
            )
        plan = Plan(
            (), self.slots, {}, (), {}, attributes=self.attributes, modules=self._modules(model)
        )
        log, _ = apply(plan, [model], [], keep=True)
        if fingerprint(model) != self.after:
            log.undo()
            raise CheckpointError(f"The journal's {self.operation} gives other shapes than it did.")
        return log

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "operation": self.operation,
            "time": self.time,
            "promise": self.promise,
            "output_difference": self.output_difference,
            "removed_ids": list(self.removed_ids),
            "added_ids": list(self.added_ids),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "before": self.before,
            "after": self.after,
            "slots": {
                name: {str(dim): _runs(slots) for dim, slots in dims.items()}
                for name, dims in self.slots.items()
            },
            "attributes": [
                [a.module, list(a.owner), a.name, a.index, value]
                for a, value in self.attributes.items()
            ],
            "modules": {name: dict(spec) for name, spec in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """The entry of plain data.

        Raises:
            CheckpointError: It is none.
        """
        try:
            if data["operation"] not in OPERATIONS:
                raise ValueError(f"unknown operation {data['operation']!r}")
            slots = {
                str(name): {int(dim): _slots(runs) for dim, runs in dims.items()}
                for name, dims in data["slots"].items()
            }
            attributes = {
                Attribute(_text(m), tuple(map(_text, owner)), _text(name), _index(i)): _whole(value)
                for m, owner, name, i, value in data["attributes"]
            }
            difference = data["output_difference"]
            return cls(
                data["operation"],
                _text(data["time"]),
                _text(data["promise"]),
                None if difference is None else float(difference),
                tuple(map(_whole, data["removed_ids"])),
                tuple(map(_whole, data["added_ids"])),
                _whole(data["parameters_before"]),
                _whole(data["parameters_after"]),
                _text(data["before"]),
                _text(data["after"]),
                slots,
                attributes,
                {_text(name): dict(spec) for name, spec in data["modules"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"An entry of the journal cannot be read: {error}") from error

    def __str__(self) -> str:
        """For people."""
        did = []
        if self.removed_ids:
            did.append(f"{len(self.removed_ids)} neurons gone")
        if self.added_ids:
            did.append(f"{len(self.added_ids)} neurons new")
        parameters = f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        return f"{self.time}  {self.operation}: {', '.join(did) or 'no neurons'}; {parameters}; {self.promise}"

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: _built(model, name, spec) for name, spec in self.modules.items()}


@dataclass(slots=True)
class Journal:
    """Every change of one model so far, in order."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """One more change."""
        self.entries.append(entry)

    def take_back(self) -> None:
        """The last change was undone."""
        self.entries.pop()

    def replay(self, model: nn.Module) -> UndoLog:
        """Change a freshly built model in all these ways; all or nothing.

        Raises:
            CheckpointError: It is not the model that was changed.
        """
        log = UndoLog()
        try:
            for entry in self.entries:
                log.add(entry.replay(model).undo)
        except BaseException:
            log.undo()
            raise
        return log

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"schema_version": SCHEMA_VERSION, "entries": [e.to_dict() for e in self.entries]}

    @classmethod
    def from_dict(cls, data: Any) -> Journal:
        """The journal of plain data.

        Raises:
            CheckpointError: It is none, or of a newer schema.
        """
        if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
            raise CheckpointError("This is no journal.")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"A journal of schema {data.get('schema_version')!r} cannot be read: {SCHEMA_VERSION} can."
            )
        return cls([Entry.from_dict(entry) for entry in data["entries"]])

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, number: int) -> Entry:
        return self.entries[number]

    def __str__(self) -> str:
        """For people."""
        if not self.entries:
            return "Nothing was changed so far."
        return "\n".join(f"{i}. {entry}" for i, entry in enumerate(self.entries, start=1))


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a model's tensors."""
    text = "\n".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in sorted(tensors(model).items())
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _runs(slots: SlotMap) -> list[list[int]]:
    """[first, count] of consecutive old slots; first is -1 for fresh ones."""
    runs: list[list[int]] = []
    for source in slots.source:
        s = -1 if source is None else source
        if runs and (s == -1 == runs[-1][0] or (s >= 0 <= runs[-1][0] and s == sum(runs[-1]))):
            runs[-1][1] += 1
        else:
            runs.append([s, 1])
    return runs


def _slots(runs: Sequence[Sequence[int]]) -> SlotMap:
    if sum(_whole(count) for _, count in runs) > WIDEST:
        raise ValueError("an axis of more slots than any model has")
    parts = (
        itertools.repeat(None, count) if first == -1 else range(_whole(first), first + count)
        for first, count in runs
    )
    return SlotMap(tuple(itertools.chain.from_iterable(parts)))


def _described(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Bypass):
        return {"kind": "Bypass", "returns": module.returns, "passes": module.passes}
    layer: Any = module.linear if isinstance(module, ReluIdentity) else module.into
    width = layer.weight.shape[0]
    return {"kind": type(module).__name__, "layer": type(layer).__name__, "width": width}


def _built(model: nn.Module, name: str, spec: Mapping[str, Any]) -> nn.Module:
    try:
        kind = spec["kind"]
        if kind == "Bypass":
            if spec["returns"] not in ("tensor", "tuple") or spec["passes"] not in (
                "input",
                "zero",
            ):
                raise ValueError("an unknown bypass")
            return Bypass(spec["returns"], spec["passes"])
        parent = model.get_submodule(name.rpartition(".")[0])
        mate = next(parent.parameters(recurse=False))
        width = _whole(spec["width"])
        if width != mate.shape[0] and width not in mate.shape:
            raise ValueError(f"a layer of {width} behind one of {mate.shape[0]}")
        options: dict[str, Any] = {"device": mate.device, "dtype": mate.dtype}
        make = LAYERS[spec["layer"]]
        more = () if make is nn.Linear else (1,)
        with torch.random.fork_rng(devices=[]):
            if kind == "ReluIdentity":
                return ReluIdentity(make(width, width, *more, **options))
            if kind == "ResidualBlock":
                return ResidualBlock(
                    make(width, width, *more, **options), make(width, width, *more, **options)
                )
        raise ValueError(f"unknown module {kind!r}")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"The journal's module {name!r} cannot be built: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _index(value: Any) -> int | None:
    return None if value is None else _whole(value)

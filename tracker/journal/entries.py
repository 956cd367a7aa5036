"""The journal: every change of a model, as plain data from which it can be done again."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple

from torch import nn

from tracker.errors import CheckpointError
from tracker.journal.replay import (
    load_architecture,
    meta_model_after,
    module_spec,
    moved_buffers,
    places,
)
from tracker.journal.run_length import Runs
from tracker.observation.neuron_ids import reason_to_leave
from tracker.structure.code_sizes.traced_int import Attribute
from tracker.surgery.plan import Plan
from tracker.surgery.receipt import Receipt
from tracker.surgery.undo import UndoLog
from tracker.utils.notebook import as_html
from tracker.utils.slotmap import SlotMap
from tracker.utils.text import in_line, short

SCHEMA_VERSION = 1
OPERATIONS = (
    "prune_units", "merge_neurons", "expand_layer", "recycle_neurons", "insert_layer", "remove_layer", "compress",
)  # fmt: skip
PROMISES = ("exact", "masked", "changed")
MOST = 100_000  # entries


@dataclass(frozen=True, slots=True)
class Entry:
    """One change: what it was, what it promised, and its structural part.

    Attributes:
        number: From 1.
        operation: Name of the call.
        time: In ISO 8601, UTC.
        step: Of the run that modifies itself; None where there is none.
        epoch: The last one that was logged; None where none was.
        promise: "exact", "masked" or "changed".
        output_difference: From that promise, as measured; None where it was not.
        units: Group name → units that went.
        removed_ids: Of neurons that went.
        added_ids: Of neurons that came.
        parameters_before: Of the model.
        parameters_after: Of the model.
        before: Fingerprint of the model's shapes before.
        after: The same afterwards.
        slots: Tensor → dimension → where its slots come from.
        layers: The same of tracked layers' neurons.
        attributes: Integers of the model's code.
        modules: What took the place of others.

    Examples:
        >>> receipt = engine.prune_neurons({"0": [1]})
        >>> entry = engine.journal[-1]
        >>> entry.operation, entry.removed_ids
        ('prune_units', (1,))
    """

    number: int
    operation: str
    time: str
    step: int | None
    epoch: int | None
    promise: str
    output_difference: float | None
    units: Mapping[str, tuple[int, ...]]
    removed_ids: tuple[int, ...]
    added_ids: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    before: str
    after: str
    slots: Mapping[str, Mapping[int, Runs]]
    layers: Mapping[str, Runs]
    attributes: Mapping[Attribute, int]
    modules: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, plan: Plan, receipt: Receipt, prints: tuple[str, str], when: When) -> Entry:
        """The entry of a change that was made; `prints`: fingerprints of the model before and after.

        Args:
            plan: What was carried out.
            receipt: Of the change.
            prints: Fingerprints of the model's shapes, before and after.
            when: Its number, step and epoch.
        """
        return cls(
            when.number,
            plan.operation,
            datetime.now().astimezone().isoformat(timespec="seconds"),
            when.step,
            when.epoch,
            receipt.promise,
            receipt.output_difference,
            {group: tuple(units) for group, units in receipt.units.items()},
            tuple(receipt.removed_ids),
            tuple(receipt.added_ids),
            receipt.parameters_before,
            receipt.parameters_after,
            *prints,
            {name: _all_runs(dims) for name, dims in plan.tensors.items()},
            _all_runs(plan.layers),
            dict(plan.attributes),
            {name: module_spec(module) for name, module in plan.modules.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: tracker/schemas/journal.schema.json describes it."""
        return {
            "number": self.number,
            "operation": self.operation,
            "time": self.time,
            "step": self.step,
            "epoch": self.epoch,
            "promise": self.promise,
            "output_difference": self.output_difference,
            "units": {group: list(units) for group, units in self.units.items()},
            "removed_ids": list(self.removed_ids),
            "added_ids": list(self.added_ids),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "before": self.before,
            "after": self.after,
            "slots": {
                name: {str(dim): _plain(runs) for dim, runs in dims.items()}
                for name, dims in self.slots.items()
            },
            "layers": {name: _plain(runs) for name, runs in self.layers.items()},
            "attributes": [
                [a.module, list(a.owner), a.name, a.index, value]
                for a, value in self.attributes.items()
            ],
            "modules": {name: dict(spec) for name, spec in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """The entry of plain data.

        Args:
            data: What `to_dict` gave.

        Raises:
            CheckpointError: It is none.
        """
        try:
            if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
                raise ValueError("other fields than an entry has")
            return cls(
                number=_whole(data["number"]),
                operation=_one_of(OPERATIONS, data["operation"]),
                time=_time(data["time"]),
                step=_optional(data["step"]),
                epoch=None if data["epoch"] is None else operator.index(data["epoch"]),
                promise=_one_of(PROMISES, data["promise"]),
                output_difference=_number(data["output_difference"]),
                units={_text(g): _ids(units) for g, units in data["units"].items()},
                removed_ids=_ids(data["removed_ids"]),
                added_ids=_ids(data["added_ids"]),
                parameters_before=_whole(data["parameters_before"]),
                parameters_after=_whole(data["parameters_after"]),
                before=_text(data["before"]),
                after=_text(data["after"]),
                slots={
                    _text(name): {int(dim): Runs.of_plain(runs) for dim, runs in dims.items()}
                    for name, dims in data["slots"].items()
                },
                layers={_text(name): Runs.of_plain(runs) for name, runs in data["layers"].items()},
                attributes={
                    Attribute(
                        _text(m), tuple(map(_text, owner)), _text(name), _optional(index)
                    ): _whole(value)
                    for m, owner, name, index, value in data["attributes"]
                },
                modules={_text(name): _spec(spec) for name, spec in data["modules"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"An entry of the journal cannot be read: {error}") from error

    def __str__(self) -> str:
        """For people."""
        did = [f"{len(units)} of {short(group)!r}" for group, units in list(self.units.items())[:3]]
        if len(self.units) > 3:
            did.append(f"and {len(self.units) - 3} more groups")
        did += [
            f"{short(name.rpartition('.')[0])} followed by a new layer" for name in self._inserted()
        ]
        did += [f"{short(name)} bypassed" for name in self.modules if name not in self._inserted()]
        if self.removed_ids:
            did.append(_counted(len(self.removed_ids), "gone"))
        if self.added_ids:
            did.append(_counted(len(self.added_ids), "new"))
        when = [self.time]
        when += [] if self.epoch is None else [f"epoch {self.epoch}"]
        when += [] if self.step is None else [f"step {self.step}"]
        difference = self.output_difference
        measured = "not measured" if difference is None else f"difference {difference:.1e}"
        return in_line(
            f"{self.number}. {self.operation} ({', '.join(when)}): {', '.join(did) or 'no neurons'}; "
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}; {self.promise}, {measured}"
        )

    @property
    def touched(self) -> Iterable[str]:
        """Names of the tensors whose slots moved."""
        return self.slots.keys()

    @property
    def reason(self) -> str:
        """Why neurons left with it."""
        return reason_to_leave(self.operation, list(self.units))

    def _inserted(self) -> list[str]:
        return [name for name, spec in self.modules.items() if spec["kind"] != "Bypass"]


class When(NamedTuple):
    """When a change was made."""

    number: int
    step: int | None
    epoch: int | None


@dataclass(slots=True)
class Journal:
    """Every change of one model so far, in order.

    Attributes:
        entries: The changes.

    Examples:
        >>> from tracker import Journal
        >>> receipt = engine.prune_neurons({"0": [1]})
        >>> Journal.from_dict(engine.journal.to_dict()) == engine.journal
        True
    """

    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """One more change.

        Args:
            entry: The change.
        """
        self.entries.append(entry)

    def take_back(self, entry: Entry) -> None:
        """A change was undone, the last one; or it never came to be noted.

        Args:
            entry: The change.
        """
        if self.entries and self.entries[-1] is entry:
            self.entries.pop()

    def replay(self, model: nn.Module, entries: Sequence[Entry] | None = None) -> UndoLog:
        """Give a freshly built model the architecture that these changes led to; all or nothing.

        entries: Others, in the place of the journal's.

        Tensors that change their shape are zero afterwards, weights belong to checkpoints.

        Args:
            model: Built by the original code, at its original sizes; it is changed in place.
            entries: Others, in the place of the journal's; None: the journal's.

        Raises:
            CheckpointError: It is not the model that was changed; it is as it was.
        """
        entries = self.entries if entries is None else entries
        meta_model, log = meta_model_after(model, entries), UndoLog()
        try:
            load_architecture(
                model, meta_model, moved_buffers(model, entries), *places(entries), log
            )
        except BaseException:
            log.undo()
            raise
        return log

    @property
    def places(self) -> tuple[list[str], list[Attribute]]:
        """Names of the modules that the changes put in place, and the integers of the model's code that they set."""
        return places(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: tracker/schemas/journal.schema.json describes it."""
        return {"schema_version": SCHEMA_VERSION, "entries": [e.to_dict() for e in self.entries]}

    @classmethod
    def from_dict(cls, data: Any) -> Journal:
        """The journal of plain data.

        Args:
            data: What `to_dict` gave.

        Raises:
            CheckpointError: It is none, or of a newer schema.
        """
        if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
            raise CheckpointError("This is no journal.")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"A journal of schema {data.get('schema_version')!r} cannot be read: {SCHEMA_VERSION} can."
            )
        if len(data["entries"]) > MOST:
            raise CheckpointError(f"A journal of more than {MOST:,} entries is not believed.")
        entries = [Entry.from_dict(entry) for entry in data["entries"]]
        for number, entry in enumerate(entries, start=1):
            if entry.number != number:
                raise CheckpointError(
                    f"Entry {number} of the journal says that it is {entry.number}."
                )
            if number > 1 and entry.before != entries[number - 2].after:
                raise CheckpointError(
                    f"Entry {number} of the journal does not follow the one before."
                )
        return cls(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, number: int) -> Entry:
        return self.entries[number]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        """For people."""
        return "\n".join(map(str, self.entries)) or "Nothing was changed so far."


def _all_runs(table: Mapping[Any, SlotMap]) -> dict[Any, Runs]:
    return {key: Runs.of(slots) for key, slots in table.items()}


def _plain(runs: Runs) -> list[list[int]]:
    return [list(part) for part in runs.parts]


def _counted(number: int, what: str) -> str:
    return f"{number} neuron{'' if number == 1 else 's'} {what}"


def _one_of(known: Sequence[str], value: Any) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


def _time(value: Any) -> str:
    datetime.fromisoformat(_text(value))
    return str(value)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(map(_whole, values))


def _spec(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ValueError(f"{data!r} is no module")
    return dict(data)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _optional(value: Any) -> int | None:
    return None if value is None else _whole(value)

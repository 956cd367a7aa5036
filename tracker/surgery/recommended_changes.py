"""Recommendations become requests: checked against the schema and the model, conflicts resolved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from tracker.errors import SurgeryError, TrackerError
from tracker.structure import Structure
from tracker.surgery.plan import units_of
from tracker.tracker import ActivationTracker
from tracker.utils.files import read_whole

LISTS: dict[str, dict[str, type]] = {
    "prune": {"neuron_id": int},
    "merge": {"neuron_pair": list},
    "expand": {"layer_name": str, "suggested_expansion": int},
}
LARGEST = 64 * 2**20  # bytes of a file that is read


@dataclass(slots=True)
class Requests:
    """What is to be done, in this order, and what was advised and cannot be done."""

    merge: list[tuple[int, int]] = field(default_factory=list)
    prune: list[int] = field(default_factory=list)
    expand: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def requests(
    tracker: ActivationTracker, advice: Mapping[str, Any] | str | PathLike[str]
) -> Requests:
    """The requests of a set of recommendations, given as a dict or the path of its JSON file.

    A neuron that is to be pruned is not merged; one that others are folded into stays; one that the model cannot spare
    (its outputs, units that comprise others) is skipped, with the reason.

    Raises:
        SurgeryError: They are no recommendations, or not of this model.
    """
    data = _read(advice)
    _check(data)
    found = Requests()
    entry = tracker.current
    widths = data.get("metadata", {}).get("model_info", {}).get("layer_details", {})
    for layer in widths if isinstance(widths, dict) else ():
        if layer not in entry.layers:
            raise SurgeryError(
                f"These recommendations are for another model: {entry.name!r} has no layer {layer!r}."
            )
    places: dict[int, tuple[str, int]] = {}

    def place(neuron: int) -> tuple[str, int] | None:
        try:
            home, index = tracker.registry.find(neuron)
        except TrackerError as error:
            found.skipped.append(str(error))
            return None
        if entry.layers.get(home.layer) is not home:
            raise SurgeryError(
                f"These recommendations are for another model: neuron {neuron} belongs to {home.model!r}."
            )
        places[neuron] = (home.layer, index)
        return places[neuron]

    structure = tracker.structure()
    targets: set[int] = set()
    for item in data["merge"]:
        keep, drop = item["neuron_pair"]
        if place(keep) is None or place(drop) is None:
            continue
        try:
            (keep_unit,), (drop_unit,) = (
                [(g, u) for g, us in units_of(structure, [places[n]]).items() for u in us]
                for n in (keep, drop)
            )
        except SurgeryError as error:
            found.skipped.append(f"merge {keep}, {drop}: {error}")
            continue
        if keep_unit[0] != drop_unit[0] or keep_unit == drop_unit:
            found.skipped.append(f"merge {keep}, {drop}: they are not read alike")
        elif drop in targets or any(drop == d for _, d in found.merge):
            found.skipped.append(f"merge {keep}, {drop}: neuron {drop} has another part to play")
        else:
            targets.add(keep)
            found.merge.append((keep, drop))
    busy = targets | {drop for _, drop in found.merge}
    taken = {place_ for n in busy for place_ in _unit(structure, places[n])}
    for neuron in dict.fromkeys(item["neuron_id"] for item in data["prune"]):
        if place(neuron) is None:
            continue
        try:
            unit = _unit(structure, places[neuron])
        except SurgeryError as error:
            found.skipped.append(f"prune {neuron}: {error}")
            continue
        if taken & set(unit):
            found.skipped.append(f"prune {neuron}: a merge needs it")
        elif any(unit[0] in _unit(structure, places[n]) for n in found.prune):
            continue  # another layer's name for the same unit
        else:
            found.prune.append(neuron)
    _leave_some(structure, places, found)
    shrinking = {places[n][0] for n in (*found.prune, *(d for _, d in found.merge))}
    for item in data["expand"]:
        layer, count = item["layer_name"], item["suggested_expansion"]
        if layer not in entry.layers:
            raise SurgeryError(
                f"These recommendations are for another model: {entry.name!r} has no layer {layer!r}."
            )
        if layer in shrinking:
            found.skipped.append(f"expand {layer}: it loses neurons")
        elif count > 0:
            found.expand[layer] = count
    return found


def _unit(structure: Structure, place: tuple[str, int]) -> list[tuple[str, int]]:
    return [(g, u) for g, us in units_of(structure, [place]).items() for u in us]


def _leave_some(
    structure: Structure, places: Mapping[int, tuple[str, int]], found: Requests
) -> None:
    """At least one unit of each group stays."""
    left = {g.name: g.size for g in structure.groups}
    for _, drop in found.merge:
        left[_unit(structure, places[drop])[0][0]] -= 1
    for neuron in list(found.prune):
        group = _unit(structure, places[neuron])[0][0]
        if left[group] == 1:
            found.prune.remove(neuron)
            found.skipped.append(f"prune {neuron}: the last unit of {group!r} stays")
        else:
            left[group] -= 1


def _read(advice: Mapping[str, Any] | str | PathLike[str]) -> dict[str, Any]:
    if isinstance(advice, Mapping):
        return dict(advice)
    path = fspath(advice)
    try:
        data = json.loads(read_whole(path, LARGEST).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SurgeryError(f"No recommendations can be read from {path!r}: {error}") from error
    if not isinstance(data, dict):
        raise SurgeryError(f"{path!r} holds no recommendations but a {type(data).__name__}.")
    return data


def _check(data: Mapping[str, Any]) -> None:
    version = data.get("schema_version", "1.0")
    if version not in ("1.0", "1.1"):
        raise SurgeryError(
            f"Recommendations of schema {version!r} cannot be read: 1.0 and 1.1 can."
        )
    for name, keys in LISTS.items():
        items = data.get(name)
        if not isinstance(items, list):
            raise SurgeryError(f"These are no recommendations: {name!r} is not a list.")
        for number, item in enumerate(items):
            for key, kind in keys.items():
                value = item.get(key) if isinstance(item, dict) else None
                good = isinstance(value, kind) and not isinstance(value, bool)
                if key == "neuron_pair" and good:
                    assert isinstance(value, list)
                    good = len(value) == 2 and all(type(n) is int for n in value)
                if not good:
                    raise SurgeryError(
                        f"These are no recommendations: {name}[{number}].{key} is {value!r}."
                    )

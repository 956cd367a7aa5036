"""What a change leaves alone: layers, groups and neurons that are named, or a share of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tracker.errors import SurgeryError
from tracker.modules.names import ByLayer, names_in
from tracker.structure import Structure, UnitGroup
from tracker.tracker import ActivationTracker

LONGEST = 1000  # characters of a name
# Names or patterns of layers, modules or groups, and neuron ids; or {name or pattern: share of its units that stay}.
Protect = str | int | Iterable[str | int] | Mapping[str, float]
# The same, modules in the place of their names as well.
Protected = Protect | nn.Module | Iterable[str | int | nn.Module] | ByLayer[float]


@dataclass(frozen=True, slots=True)
class Protection:
    """What of the current structure stays.

    Attributes:
        least: By group, units that must stay.
        pinned: By group, units that must be among them.
    """

    least: Mapping[str, int] = field(default_factory=dict)
    pinned: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def floor(self, group: UnitGroup) -> int:
        """Units of a group that must stay."""
        return max(self.least.get(group.name, 0), len(self.pinned_of(group)))

    def pinned_of(self, group: UnitGroup) -> frozenset[int]:
        """Units of a group that must stay themselves."""
        return self.pinned.get(group.name, frozenset())

    def covers(self, group: UnitGroup) -> bool:
        """Whether nothing of a group may go."""
        return self.floor(group) >= group.size

    def sparing(self, structure: Structure, neurons: Collection[int]) -> Protection:
        """The same, and units of nothing but these neurons stay as well; of a group of such units, all but the first.

        Args:
            structure: The current one.
            neurons: Ids.
        """
        pinned, young = dict(self.pinned), set(neurons)
        for group in structure.groups if young else ():
            units = [u for u in range(group.size) if young.issuperset(group.neuron_ids(u))]
            spared = frozenset(units if len(units) < group.size else units[1:])
            if spared:
                pinned[group.name] = self.pinned_of(group) | spared
        return replace(self, pinned=pinned)

    def refuse(
        self, structure: Structure, recycle: Mapping[str, Sequence[int]], expand: Iterable[str]
    ) -> None:
        """Refuse what would give protected units a new start, or groups of which nothing may go new ones.

        Raises:
            SurgeryError: It would.
        """
        groups = {g.name: g for g in structure.groups}
        for name in {*recycle, *expand} & groups.keys():
            group = groups[name]
            if self.covers(group) or self.pinned_of(group) & set(recycle.get(name, ())):
                raise SurgeryError(f"{name!r} is protected: it is left as it is.")

    def allowed(
        self, structure: Structure, units: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, list[int]], list[str]]:
        """Which of these units may go, the first ones first; and what may not, for people.

        Raises:
            SurgeryError: None may.
        """
        groups, skipped = {g.name: g for g in structure.groups}, list[str]()
        found: dict[str, list[int]] = {}
        for name, asked in units.items():
            wanted = list(asked)
            group = groups.get(name)
            if group is None:
                found[name] = wanted  # refused by who knows why
                continue
            able = [u for u in wanted if u not in self.pinned_of(group)]
            able = able[: max(group.size - self.floor(group), 0)]
            if able:
                found[name] = able
            if len(able) < len(wanted):
                kept = [u for u in wanted if u not in able]
                skipped.append(f"units {_some(kept)} of {name}: protected")
        if skipped and not found:
            raise SurgeryError(f"All that is to go is protected: {'; '.join(skipped[:4])}.")
        return found, skipped


NOTHING = Protection()


def protection(
    tracker: ActivationTracker,
    protect: Protected,
    sizes: Mapping[str, int] | None = None,
    *,
    strict: bool = True,
) -> Protection:
    """What a user wants left alone, in groups and units of the current structure.

    A layer is named by itself, by a pattern as of a shell ("encoder.*.fc?"; "*" also stands for dots), or by a module
    that it is part of. Its neurons stay: so do the units of every group that comprises some of them.

    Args:
        tracker: Of the current model.
        protect: Names, patterns, modules and ids, of all of which nothing goes; or {name, pattern or module: share
            that stays}.
        sizes: Units of each group that shares are of; those that it has now where it is not among them.
        strict: Refuse ids that are no more.

    Raises:
        SurgeryError: A name or a pattern matches nothing, or a share is none.
        UnknownNeuronError: No neuron has such an id.
    """
    shares, ids = wanted(names_in(tracker.current.model, protect, pattern=True))
    if not shares and not ids:
        return NOTHING
    structure = tracker.structure()
    least = dict[str, int]()
    for pattern, share in shares.items():
        for group in matching(tracker, pattern):
            size = (sizes or {}).get(group.name, group.size)
            units = group.size if share == 1 else math.ceil(share * size - 1e-9)
            least[group.name] = max(least.get(group.name, 0), min(units, group.size))
    pinned: dict[str, frozenset[int]] = {}
    for neuron in ids if strict else ():
        tracker.registry.find(neuron)
    for group in structure.groups if ids else ():
        units_ = frozenset(u for u in range(group.size) if ids & set(group.neuron_ids(u)))
        if units_:
            pinned[group.name] = units_
    return Protection(least, pinned)


def wanted(protect: Protected) -> tuple[dict[str, float], set[int]]:
    """Shares by name or pattern, and ids.

    Raises:
        SurgeryError: It is neither names, nor ids, nor shares by name.
    """
    if isinstance(protect, Mapping):
        shares = dict[str, float]()
        for name, share in protect.items():
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not isinstance(name, str) or not number or not 0 <= share <= 1:
                raise SurgeryError(
                    "What is protected by shares is {name or pattern: share of its units that stay, 0 to 1}, not "
                    f"{{{name!r}: {share!r}}}."
                )
            _require_name(name)
            shares[name] = float(share)
        return shares, set()
    listed = [protect] if isinstance(protect, str | int | Tensor | nn.Module) else protect
    names, ids = dict[str, float](), set[int]()
    for one in listed if isinstance(listed, Iterable) else [listed]:
        if isinstance(one, str):
            _require_name(one)
            names[one] = 1.0
        elif isinstance(one, int) and not isinstance(one, bool):
            ids.add(one)
        elif isinstance(one, nn.Module):
            raise SurgeryError(
                f"A policy is plain data, and knows no model: protect this {type(one).__name__} by its name, or by a "
                'pattern as "encoder.*".'
            )
        else:
            raise SurgeryError(
                "What is protected are names or patterns of layers and groups, and neuron ids, or {name: share that "
                f"stays}}; not {one!r}."
            )
    return names, ids


def _require_name(name: str) -> None:
    if len(name) > LONGEST:
        raise SurgeryError(
            f"A name or pattern of {len(name):,} characters, {name[:40]!r}..., is none: {LONGEST:,} are the most."
        )


def matching(tracker: ActivationTracker, pattern: str) -> list[UnitGroup]:
    """The groups that a name or a pattern stands for; none where it is of a layer that no group comprises.

    Raises:
        SurgeryError: It matches no group, no layer and no module.
    """
    modules = [name for name, _ in tracker.current.model().named_modules() if name]
    named = [n for n in modules if fnmatchcase(n, pattern)]
    found = [
        group
        for group in tracker.structure().groups
        if fnmatchcase(group.name, pattern) or any(map(_is_under(named), _layers(group)))
    ]
    if not found and not named:
        known = [*(g.name for g in tracker.structure().groups), *modules]
        near = difflib.get_close_matches(pattern, known, 3, 0.5) or list(dict.fromkeys(known))[:6]
        raise SurgeryError(
            f"Nothing is named {pattern!r}: no layer, module or group. There are {_some(near)}, for example; patterns "
            'are as of a shell, "layer4.*".'
        )
    return found


def protects(tracker: ActivationTracker, protect: Protect, module: str) -> bool:
    """Whether a module, all of it, may not go: it, or a part of it, or what it is part of is named."""
    shares, ids = wanted(protect)
    names = [n for n, _ in tracker.current.model().named_modules() if n]
    named = [n for n in names if any(s and fnmatchcase(n, p) for p, s in shares.items())]
    named += [n for n, layer in tracker.current.layers.items() if ids & set(layer.ids)]
    named += [
        layer
        for group in tracker.structure().groups
        if any(s and fnmatchcase(group.name, p) for p, s in shares.items())
        for layer in group.layers
    ]
    return any(_is_under([module])(n) or _is_under([n])(module) for n in named)


def _layers(group: UnitGroup) -> list[str]:
    return list(dict.fromkeys([*group.layers, *(name for name, _ in group.neurons(0))]))


def _is_under(modules: Sequence[str]) -> Callable[[str], bool]:
    return lambda layer: any(layer == m or layer.startswith(f"{m}.") for m in modules)


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:6])) + (" …" if len(values) > 6 else "")

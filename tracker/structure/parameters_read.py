"""Which parameters the recorded passes read, and which of their indices: of the others nothing is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tracker.structure.axes import Axis, Labels

Place = tuple[str, int]  # a tensor's key in the state dict, and a dimension


class Reading:
    """What was given to operations that compute: parameters as a whole, or views of parts of them."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._whole: set[str] = set()
        self._axes: set[Place] = set()  # read along the whole dimension
        self._parts: dict[Place, list[Axis]] = {}

    def whole(self, name: str) -> None:
        """A parameter was given as it is."""
        self.names.add(name)
        self._whole.add(name)

    def part(
        self,
        axes: Sequence[Axis],
        origin: Sequence[Iterable[Place]],
        parameters: Mapping[str, Sequence[Axis]],
    ) -> None:
        """A view of parameters was given: its axes, and the dimensions of parameters that they come from."""
        for axis, places in zip(axes, origin, strict=True):
            for name, dim in places:
                self.names.add(name)
                if axis is not None and axis is parameters[name][dim]:
                    self._axes.add((name, dim))
                elif axis is None or (name, dim) not in self._axes:
                    self._parts.setdefault((name, dim), []).append(axis)

    def freeze_rest(
        self, labels: Labels, parameters: Mapping[str, Sequence[Axis]], names: Iterable[str]
    ) -> None:
        """No index of these parameters can die that was in no view that was read."""
        for name in names:
            if name in self._whole or name not in parameters:
                continue
            for dim, axis in enumerate(parameters[name]):
                parts = self._parts.get((name, dim))
                if axis is None or parts is None or (name, dim) in self._axes:
                    continue
                read: set[int] = set()
                for part in parts:
                    read |= labels.every(part) if part is not None else set()
                rest = [row - read for row in labels.rows(axis)]
                at = _ranges([i for i, row in enumerate(rest) if row])
                for label in frozenset().union(*rest):
                    labels.frozen.setdefault(
                        label, f"indices {at} of {name}[{dim}] were not read by any example call"
                    )


def _ranges(indices: Sequence[int]) -> str:
    """Indices for people: "3, 8 to 63"."""
    found: list[list[int]] = []
    for i in indices:
        if found and found[-1][1] == i - 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    said = [str(a) if a == b else f"{a} to {b}" for a, b in found]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more ranges" if len(said) > 4 else "")

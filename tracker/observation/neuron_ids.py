"""An id for every neuron, which it keeps for life and which no other ever gets."""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tracker.errors import NotTrackedError, UnknownNeuronError
from tracker.utils.slotmap import SlotMap

MOST = 2**53  # ids, which JSON holds exactly


def reason_to_leave(operation: str, groups: Sequence[str]) -> str:
    """What is told of a neuron that left. Each of many neurons keeps it: of many groups it names the first."""
    if not groups:
        return f"removed by {operation}"
    more = f" and {len(groups) - 1} others" if len(groups) > 1 else ""
    return f"removed by {operation} (group {groups[0]}{more})"


class NeuronId(int):
    """The id of a neuron: an int that says so, wherever it is filtered, sorted or sliced to.

    Where a layer's neurons are asked for, {layer name: [...]}, ids are read as ids and plain ints as local indices.
    A file of `torch.save` that holds ids loads with `weights_only=True` wherever this package is imported.
    """

    __slots__ = ()


torch.serialization.add_safe_globals([NeuronId])


def named(ids: Iterable[int]) -> list[int]:
    """These ids, each of which says that it is one: a list of the caller's own."""
    return [NeuronId(i) for i in ids]


@dataclass(slots=True)
class LayerIds:
    """The ids of one layer's neurons, in the order of their slots."""

    model: str
    layer: str
    ids: list[int]
    index: dict[int, int] = field(default_factory=dict)  # made when first asked

    def local_index(self, neuron_id: int) -> int | None:
        """Slot of the neuron, or None when it has left the layer."""
        if len(self.index) != len(self.ids):
            self.index = {n: i for i, n in enumerate(self.ids)}
        return self.index.get(neuron_id)


class NeuronRegistry:
    """Gives out ids, counting up, over all the models of an engine."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # first id of each block of ids that was given out
        self._blocks: list[LayerIds] = []  # the layer that got the block
        self._next = 0
        self._gone: dict[int, str] = {}  # id → when and why it left

    def register(
        self, model: str, layer: str, neurons: int, known: Sequence[int] | None = None
    ) -> LayerIds:
        """Ids for a new layer; `known`: those that its neurons had at another time."""
        entry = LayerIds(model, layer, [])
        if known is None:
            self._extend(entry, neurons)
        else:
            self.adopt(entry, known, "")
        return entry

    def remap(
        self, entry: LayerIds, slots: SlotMap, why: str, known: Iterator[int] | None = None
    ) -> list[int]:
        """Move the ids of a layer as its slots moved; return the new ones.

        Args:
            entry: Of the layer.
            slots: How they moved.
            why: What is told of those that leave.
            known: Ids for the new ones, as `free` gave them; None: the next ones.
        """
        old = list(entry.ids)
        kept = set(slots.known)
        self._gone.update({n: why for i, n in enumerate(old) if i not in kept})
        fresh, births = LayerIds(entry.model, entry.layer, []), slots.size - len(slots.known)
        if known is None:
            self._extend(fresh, births, owner=entry)
        else:
            fresh.ids += itertools.islice(known, births)
            self._own(entry, fresh.ids)
        new = iter(fresh.ids)
        entry.ids[:] = [next(new) if s is None else old[s] for s in slots.source]
        entry.index = {}
        return fresh.ids

    def free(self, ids: Sequence[int]) -> Iterator[int] | None:
        """These ids, for the neurons that had them at another time; None where others have them now."""
        blocks = [bisect_right(self._starts, i) - 1 for i in ids]
        living = (
            b >= 0 and self._blocks[b].local_index(i) is not None
            for b, i in zip(blocks, ids, strict=True)
        )
        return None if any(living) or len({*ids}) < len(ids) else iter(ids)

    def adopt(self, entry: LayerIds, ids: Sequence[int], why: str) -> None:
        """Give a layer the ids that it had at another time; `why` is told of those that leave it."""
        self._gone.update(dict.fromkeys(set(entry.ids) - {*ids}, why))
        self._own(entry, ids)
        entry.ids[:] = ids
        entry.index = {}

    def snapshot(self) -> Callable[[], None]:
        """How to have whose ids are whose as it is now; none is given out twice."""
        starts, blocks, gone = list(self._starts), list(self._blocks), dict(self._gone)

        def back() -> None:
            self._starts, self._blocks, self._gone = starts, blocks, gone

        return back

    def first_ids(self, entry: LayerIds, count: int) -> tuple[int, ...]:
        """The ids that a layer of so many neurons got when it was registered; none where that is not known."""
        starts = (s for s, b in zip(self._starts, self._blocks, strict=True) if b is entry)
        start = next(starts, None)
        return () if start is None else tuple(range(start, start + count))

    @property
    def next_id(self) -> int:
        """The id that the next new neuron gets."""
        return self._next

    def skip_to(self, neuron_id: int) -> None:
        """Give out no id below this one any more: they were given to neurons of changes that were undone."""
        self._next = max(self._next, neuron_id)

    def restore(self, entry: LayerIds, ids: list[int]) -> None:
        """Take a `remap` back."""
        for neuron in ids:
            self._gone.pop(neuron, None)
        entry.ids[:] = ids
        entry.index = {}

    def find(self, neuron_id: int) -> tuple[LayerIds, int]:
        """The layer and the local index of a living neuron.

        Raises:
            UnknownNeuronError: No neuron ever had this id, or it has left (then it says when and why).
        """
        try:
            neuron_id = operator.index(neuron_id)
        except TypeError:
            raise UnknownNeuronError(f"A neuron id is an integer, not {neuron_id!r}.") from None
        if neuron_id in self._gone:
            raise UnknownNeuronError(
                f"Neuron {neuron_id} has left the network: {self._gone[neuron_id]}."
            )
        block = bisect_right(self._starts, neuron_id) - 1
        if block < 0 or neuron_id >= self._next:
            known = f"0 to {self._next - 1}" if self._next else "none yet: track_model comes first"
            raise UnknownNeuronError(
                f"There is no neuron {neuron_id}. Ids given out so far: {known}."
            )
        entry = self._blocks[block]
        index = entry.local_index(neuron_id)
        if index is None:
            raise UnknownNeuronError(
                f"Neuron {neuron_id} belongs to a model that was not saved with this one: track that model again."
            )
        return entry, index

    def to_dict(self, layers: Mapping[str, LayerIds]) -> dict[str, Any]:
        """Plain data of one model's layers, for JSON."""
        own = {id(entry): name for name, entry in layers.items()}
        blocks = [
            [start, own.get(id(block), "")]  # "": of another model, or long gone
            for start, block in zip(self._starts, self._blocks, strict=True)
        ]
        gone = {str(n): why for n, why in self._gone.items()}
        ids = {name: list(entry.ids) for name, entry in layers.items()}
        return {"next": self._next, "blocks": blocks, "gone": gone, "layers": ids}

    def restore_from(self, data: Mapping[str, Any], model: str) -> dict[str, LayerIds]:
        """Take over what `to_dict` gave; the layers by name.

        Raises:
            ValueError: An id occurs twice, or was never given out.
        """
        top = data["next"]
        layers = {n: LayerIds(model, n, list(ids)) for n, ids in data["layers"].items()}
        gone = {int(n): str(why) for n, why in data["gone"].items()}
        blocks = [(start, str(name)) for start, name in data["blocks"]]
        numbers = [
            top,
            *(i for layer in layers.values() for i in layer.ids),
            *(b for b, _ in blocks),
        ]
        if any(type(number) is not int for number in numbers) or top > MOST:
            raise ValueError("an id is no whole number, or larger than any")
        living = [i for entry in layers.values() for i in entry.ids]
        every = [*living, *gone]
        if len(set(every)) < len(every) or any(not 0 <= i < top for i in every):
            raise ValueError("an id occurs twice, or was never given out")
        starts = [start for start, _ in blocks]
        if starts != sorted(set(starts)) or (living and (not starts or starts[0] > min(living))):
            raise ValueError("blocks of ids are out of order")
        if starts and not (starts[0] == 0 and starts[-1] < top):
            raise ValueError("blocks of ids do not begin and end where ids do")
        for name, layer in layers.items():
            if any(blocks[bisect_right(starts, i) - 1][1] != name for i in layer.ids):
                raise ValueError(f"an id of {name} was given to another layer")
        other = LayerIds("", "", [])
        self._starts, self._next, self._gone = starts, top, gone
        self._blocks = [layers.get(name, other) for _, name in blocks]
        return layers

    def _own(self, entry: LayerIds, ids: Iterable[int]) -> None:
        """Have the blocks say that these ids are a layer's."""
        runs: list[list[int]] = []
        for neuron in sorted(ids):
            self._gone.pop(neuron, None)
            if runs and runs[-1][1] == neuron:
                runs[-1][1] += 1
            else:
                runs.append([neuron, neuron + 1])
        for first, end in runs:
            at, behind = bisect_left(self._starts, first), bisect_right(self._starts, end) - 1
            after = self._blocks[behind] if behind >= 0 else entry
            upto = bisect_left(self._starts, end)
            new = (
                [first]
                if end >= self._next or self._starts[upto : upto + 1] == [end]
                else [first, end]
            )
            self._starts[at:upto] = new
            self._blocks[at:upto] = [entry, after][: len(new)]
            self._next = max(self._next, end)

    def _extend(self, entry: LayerIds, count: int, owner: LayerIds | None = None) -> None:
        if count:
            self._starts.append(self._next)
            self._blocks.append(owner or entry)
            entry.ids += range(self._next, self._next + count)
            self._next += count


def layer_named(layers: Sequence[str], name: str) -> str:
    """`name`, if it is one of `layers`.

    Raises:
        NotTrackedError: It is not; the message lists what is there.
    """
    if name not in layers:
        some = ", ".join(map(repr, layers[:8])) + (" ..." if len(layers) > 8 else "")
        raise NotTrackedError(
            f"No tracked layer is named {name!r}. Tracked layers: {some or 'none'}."
        )
    return name

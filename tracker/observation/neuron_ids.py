"""An id for every neuron, which it keeps for life and which no other ever gets."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tracker.errors import NotTrackedError, UnknownNeuronError
from tracker.utils.slotmap import SlotMap

MOST = 2**53  # ids, which JSON holds exactly


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

    def register(self, model: str, layer: str, neurons: int) -> LayerIds:
        """Ids for a new layer."""
        entry = LayerIds(model, layer, [])
        self._extend(entry, neurons)
        return entry

    def remap(self, entry: LayerIds, slots: SlotMap, why: str) -> list[int]:
        """Move the ids of a layer as its slots moved; return the new ones. `why` is told of those that leave."""
        old = list(entry.ids)
        kept = set(slots.known)
        self._gone.update({n: why for i, n in enumerate(old) if i not in kept})
        fresh = LayerIds(entry.model, entry.layer, [])
        self._extend(fresh, slots.size - len(slots.known), owner=entry)
        births = iter(fresh.ids)
        entry.ids[:] = [next(births) if s is None else old[s] for s in slots.source]
        entry.index = {}
        return fresh.ids

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

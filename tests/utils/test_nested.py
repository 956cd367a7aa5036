"""Tensors are found in whatever objects a model takes and returns, and a change is the same whichever these are."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import attrs
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tracker import NeuronEngine
from tracker.utils.nested import first_floating, replaced, tensors_in


@dataclass(frozen=True)
class Record:
    first: Any
    second: Any = None


@attrs.frozen
class Attrs:
    first: Any
    second: Any = None


class Named(NamedTuple):
    first: Any
    second: Any = None


class Plain:
    def __init__(self, first: Any, second: Any = None) -> None:
        self.first, self.second = first, second


class Slots:
    __slots__ = ("first", "second")

    def __init__(self, first: Any, second: Any = None) -> None:
        self.first, self.second = first, second


class Registered:
    """Nothing but its registration tells what is in it."""

    def __init__(self, first: Any, second: Any = None) -> None:
        self._hidden = lambda: (first, second)

    @property
    def first(self) -> Any:
        return self._hidden()[0]

    @property
    def second(self) -> Any:
        return self._hidden()[1]


pytree.register_pytree_node(
    Registered, lambda r: ([r.first, r.second], None), lambda parts, _: Registered(*parts)
)


class Table(collections.UserDict[str, Any]):
    """A mapping that is no dict."""


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "dataclass": Record,
    "attrs": Attrs,
    "namedtuple": Named,
    "object": Plain,
    "slots": Slots,
    "namespace": lambda a, b: types.SimpleNamespace(first=a, second=b),
    "pytree": Registered,
    "dict": lambda a, b: {"first": a, "second": b},
    "mapping": lambda a, b: Table(first=a, second=b),
    "ordered": lambda a, b: collections.OrderedDict(first=a, second=b),
    "list": lambda a, b: [a, b],
    "deque": lambda a, b: collections.deque([a, b]),
}


def first_of(value: Any) -> Any:
    if hasattr(value, "first"):
        return value.first
    return value["first"] if isinstance(value, collections.abc.Mapping) else value[0]


leaf = st.one_of(st.integers(0, 9).map(lambda n: torch.full((2,), float(n))), st.none(), st.text())
nested = st.recursive(
    leaf,
    lambda inner: st.builds(
        lambda kind, a, b: KINDS[kind](a, b), st.sampled_from(list(KINDS)), inner, inner
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(nested)
def test_what_is_replaced_is_what_is_found(value: Any) -> None:
    before = tensors_in(value)
    kept = [t.clone() for t in before]
    new = replaced(value, lambda t: t.double() + 1)
    assert type(new) is type(value) or not before or isinstance(value, Tensor)
    assert [t.tolist() for t in tensors_in(new)] == [(t + 1).tolist() for t in kept]
    assert all(t.dtype == torch.float64 for t in tensors_in(new))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(value), kept, strict=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_holds_itself_is_followed_once(kind: str) -> None:
    ring: list[Any] = [torch.ones(2)]
    value = KINDS[kind](torch.zeros(2), ring)
    ring.append(value)
    assert len(tensors_in(value)) == 2
    if kind == "pytree":
        return  # made of its parts: a registered one cannot hold itself and be made anew
    new = replaced(value, lambda t: t + 1)
    assert sorted(float(t.sum()) for t in tensors_in(new)) == [2, 4]
    assert sorted(float(t.sum()) for t in tensors_in(value)) == [0, 2]


def test_lengths_of_a_packed_sequence_are_no_values() -> None:
    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 3, 2]), batch_first=True)
    assert [t is packed.data for t in tensors_in(packed)] == [True]
    new = replaced(packed, torch.zeros_like)
    assert isinstance(new, PackedSequence)
    assert torch.equal(new.batch_sizes, packed.batch_sizes)


def test_modules_and_caches_that_are_returned_are_not_followed() -> None:
    class MyCache:
        def __init__(self) -> None:
            self.keys = torch.zeros(3)

    value = Plain(nn.Linear(2, 2), MyCache())
    assert tensors_in(value) == []
    assert first_floating(value) is None
    # A cache that a model is given is among its arguments, and cast like them.
    assert replaced(value, Tensor.double).second.keys.dtype == torch.float64


class Wrapped(nn.Module):
    """Takes its input, and returns its output and a hidden layer, in an object."""

    def __init__(self, put: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.put = put

    def forward(self, given: Any) -> Any:
        h = torch.relu(self.a(first_of(given)))
        return self.put(self.c(torch.relu(self.b(h))), {"deep": [h]})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_change_is_the_same_whatever_objects_go_in_and_out(kind: str) -> None:
    put = KINDS[kind]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for into, out in ((put, put), (lambda a, b: [a, b], lambda a, b: (a, b))):
        torch.manual_seed(0)
        model, engine = Wrapped(out), NeuronEngine()
        engine.track_model(model, example_inputs=(into(x, "text"),))
        groups = [(g.name, g.prunable, g.exact) for g in engine.structure.groups]
        receipt = engine.prune_units({"b": [1, 2, 5]})
        found.append((groups, receipt.promise, [t.tolist() for t in tensors_in(model(into(x, 0)))]))
    assert found[0] == found[1]
    assert found[0][0] == [("b", True, True)]  # what makes the hidden layer is part of the output


def test_a_packed_sequence_goes_in_and_out() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.f = nn.LSTM(6, 10, batch_first=True), nn.Linear(10, 3)
            self.s = nn.GRU(3, 4, batch_first=True)

        def forward(self, packed: PackedSequence) -> PackedSequence:
            out, _ = self.r(packed)
            return self.s(PackedSequence(self.f(out.data), *out[1:]))[0]

    packed = pack_padded_sequence(torch.randn(3, 5, 6), torch.tensor([5, 3, 2]), batch_first=True)
    model, engine = Recurrent(), NeuronEngine()
    engine.track_model(model, example_inputs=packed)
    assert [g.name for g in engine.structure.groups if g.prunable] == ["r", "f"]
    assert engine.prune_units({"r": [0, 4], "f": [1]}).promise == "masked"
    assert model(packed).data.shape == (10, 4)

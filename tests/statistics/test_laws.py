"""The statistics are an algebra: merge is associative and commutative, empty is neutral, order never matters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tracker.observation.consumer_inputs import ConsumerInput, remapped
from tracker.statistics import Activity, Covariance, Scratch, observe
from tracker.utils.slotmap import SlotMap

NEURONS = 4
Statistic = Activity | Covariance


def activity_of(sample: Tensor) -> Activity:
    """Threshold 0.5, so that firing differs from being non-zero."""
    return observe(sample, 1, 0.5, Scratch())


OF: dict[str, tuple[Callable[[Tensor], Statistic], Callable[[int], Statistic]]] = {
    "Activity": (activity_of, Activity.empty),
    "Covariance": (Covariance.of, Covariance.empty),
}


@st.composite
def samples(draw: st.DrawFn, neurons: int = NEURONS) -> Tensor:
    """(n, neurons), n from 0: normal values around a mean from 0 to 1e3, some exactly zero."""
    n = draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(n, neurons, generator=g) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    x = x + draw(st.sampled_from([0.0, 1.0, -1e3]))
    return torch.where(torch.rand(n, neurons, generator=g) < draw(st.sampled_from([0, 0.5])), 0, x)


@st.composite
def slot_maps(draw: st.DrawFn) -> SlotMap:
    """Prunings, orders and growths of an axis of NEURONS."""
    slots = draw(st.permutations(range(NEURONS)))[: draw(st.integers(1, NEURONS))]
    return SlotMap((*slots, *[None] * draw(st.integers(0, 2))))


def close(a: Statistic, b: Statistic) -> None:
    """Equal to rounding; a co-moment's rounding is that of its two neurons' deviations."""
    if isinstance(a, Covariance):
        assert torch.equal(a.count, b.count)
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-10)
        scale = a.comoment.diagonal().clamp(min=1e-9).sqrt()
        error = (a.comoment - b.comoment).abs() / torch.outer(scale, scale)
        assert error.max() < 1e-6
        return
    for name in a.__dataclass_fields__:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-4)


def counts(a: Activity) -> Tensor:
    """Rows that must be exact."""
    return torch.cat((a.table[:4], a.table[7:]))


@pytest.mark.parametrize("kind", OF)
@given(x=samples(), y=samples(), z=samples())
@settings(deadline=None, max_examples=60)
def test_merge_is_associative_and_commutative(kind: str, x: Tensor, y: Tensor, z: Tensor) -> None:
    """(a·b)·c = a·(b·c), a·b = b·a."""
    of, _ = OF[kind]
    a, b, c = of(x), of(y), of(z)
    close(a.merge(b).merge(c), a.merge(b.merge(c)))
    close(a.merge(b), b.merge(a))


@pytest.mark.parametrize("kind", OF)
@given(x=samples(), y=samples())
@settings(deadline=None, max_examples=60)
def test_merge_equals_one_pass(kind: str, x: Tensor, y: Tensor) -> None:
    """of(x)·of(y) = of(x ++ y): statistics of parts are statistics of the whole."""
    of, _ = OF[kind]
    merged, whole = of(x).merge(of(y)), of(torch.cat((x, y)))
    if isinstance(merged, Activity):
        assert torch.equal(counts(merged), counts(whole))
        merged = Activity(merged.table[[0, 5, 6]])
        whole = Activity(whole.table[[0, 5, 6]])
    close(merged, whole)


@pytest.mark.parametrize("kind", OF)
@given(x=samples())
@settings(deadline=None, max_examples=30)
def test_empty_is_neutral(kind: str, x: Tensor) -> None:
    """Bit for bit, on both sides."""
    of, empty = OF[kind]
    a = of(x)
    for merged in (a.merge(empty(NEURONS)), empty(NEURONS).merge(a)):
        for name in a.__dataclass_fields__:
            torch.testing.assert_close(getattr(merged, name), getattr(a, name), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OF)
@given(x=samples(), y=samples(), slots=slot_maps())
@settings(deadline=None, max_examples=60)
def test_reslot_commutes_with_merge(kind: str, x: Tensor, y: Tensor, slots: SlotMap) -> None:
    """Moving neurons before or after two windows are merged is the same."""
    of, _ = OF[kind]
    a, b = of(x), of(y)
    close(a.remap(slots).merge(b.remap(slots)), a.merge(b).remap(slots))


@given(x=samples(), slots=slot_maps())
@settings(deadline=None, max_examples=30)
def test_reslot_keeps_what_survives(x: Tensor, slots: SlotMap) -> None:
    """A survivor has exactly its old statistics, a fresh neuron none."""
    before, after = activity_of(x), activity_of(x).remap(slots)
    for new, old in enumerate(slots.source):
        expected = Activity.empty(1).table[:, 0] if old is None else before.table[:, old]
        assert torch.equal(after.table[:, new], expected)


@given(data=st.data(), x=samples(), asked=st.sets(st.integers(0, 6)))
@settings(deadline=None, max_examples=60)
def test_moves_made_later_are_those_made_at_once(
    data: st.DataObject, x: Tensor, asked: set[int]
) -> None:
    """Whether it is asked for in between or not; what consumers share they go on sharing."""
    own = Covariance.of(x)
    reads = {name: ConsumerInput(1, own) for name in ("a", "b")}
    for step in range(data.draw(st.integers(1, 6))):
        size = len(own.mean)
        order = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
        slots = SlotMap((*order, *[None] * data.draw(st.integers(0, 2))))
        own = own.remap(slots)
        reads = remapped(reads, {name: {1: slots} for name in reads})
        if step in asked:
            close(reads["a"].covariance, own)
    found = reads["a"].covariance
    assert found is reads["a"].covariance is reads["b"].covariance
    for mine, expected in (
        (found.count, own.count),
        (found.mean, own.mean),
        (found.comoment, own.comoment),
    ):
        assert torch.equal(mine, expected)


@given(x=samples(neurons=6))
@settings(deadline=None, max_examples=40)
def test_a_fresh_neuron_has_no_correlation_with_old_ones(x: Tensor) -> None:
    """It has not seen the same stream; fresh ones among themselves have."""
    grown = Covariance.of(x[:, :4]).remap(SlotMap.appending(4, 2)).merge(Covariance.of(x.flip(0)))
    r = grown.correlation()
    if len(x):
        assert r[:4, 4:].isnan().all()
    alone = Covariance.of(x.flip(0)).correlation()
    torch.testing.assert_close(r[4:, 4:], alone[4:, 4:], equal_nan=True)


@given(cuts=st.lists(st.integers(0, 200), max_size=6))
@settings(deadline=None, max_examples=30)
def test_batching_never_matters(cuts: list[int]) -> None:
    """However a stream is cut into batches."""
    x = torch.randn(200, NEURONS, generator=torch.Generator().manual_seed(0)) + 5
    edges = [0, *sorted(cuts), 200]
    total = Activity.empty(NEURONS)
    for start, stop in pairwise(edges):
        total = total.merge(activity_of(x[start:stop]))
    whole = activity_of(x)
    assert torch.equal(counts(total), counts(whole))
    torch.testing.assert_close(total.table[5:7], whole.table[5:7], rtol=1e-6, atol=1e-6)

"""A policy buys and sells in the loss: what it is told to cost is what it costs, together no more than it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.subjects import QUICK
from tracker import NeuronEngine, Policy, SurgeryError
from tracker.compensation import backward
from tracker.training.choices import Candidate, Requests, Size


def seen(loss_of: Any, *, classes: int = 6, steps: int = 400) -> tuple[Any, ...]:
    """A trained network, the candidates that a policy of its own was given, and its loss on all data."""
    torch.manual_seed(0)
    x = torch.randn(512, 12)
    teacher = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, classes))
    y = teacher(x).detach() * 2 + torch.randn(512, classes)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, classes))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:8])
    given: list[Any] = []

    def rule(candidates: Any, now: Size, losses: Any, blocked: Any) -> Requests | None:
        given[:] = [candidates]
        return None

    engine.start_self_modification(
        Policy.of(rule, warm_up=steps - 12, every=12, look=4, settle=4, floor=1, at_most=0.9)
    )
    for _ in range(steps):
        loss = loss_of(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        engine.step(loss)
    return model, engine, given[0], lambda: float(loss_of(model(x), y).detach())


def squares(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def entropy(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, y.argmax(1))


@pytest.mark.parametrize("loss_of", [squares, entropy])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_predicted_rise_is_the_one_that_comes(loss_of: Any, scale: float) -> None:
    """Of the layer that puts out the result: there the curvature is known, whatever the loss is multiplied by."""
    _, engine, candidates, loss = seen(lambda out, y: scale * loss_of(out, y))
    (one,) = candidates
    assert one.in_loss
    before, count = loss(), 8
    predicted = one.errors[count - 1]
    engine.prune_units({one.name: list(one.order[:count])}, compensate=True)
    rise = (loss() - before) / before
    assert rise / 2.5 < predicted < rise * 2.5


def test_without_gradients_it_is_an_error_of_the_outputs() -> None:
    def policy(**how: Any) -> bool:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(64, 6)
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=x)
        engine.start_self_modification(Policy(**QUICK, **how))
        for _ in range(10):
            model(x).square().mean().backward()
            engine.step(1.0)
        return "rise of the loss" in engine.life[-1].why

    assert policy()
    assert not policy(gradients=False)


def group(name: str, errors: list[float], cost: float, gains: tuple[float, ...] = ()) -> Candidate:
    size = len(errors) + 4
    return Candidate(
        name, name, size, tuple(range(size - 1)), tuple(errors), Size(cost, cost), gains=gains
    )


rises = st.lists(st.floats(0.0, 0.01), min_size=1, max_size=12).map(
    lambda steps: torch.tensor(steps).double().cumsum(0).tolist()
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rises, min_size=1, max_size=4), st.floats(0.0, 0.03))
def test_a_look_costs_no_more_than_it_may(errors: list[list[float]], tolerance: float) -> None:
    """All groups together; and nothing more would fit where it costs least."""
    free = [group(f"g{i}", e, 3.0) for i, e in enumerate(errors)]
    policy = Policy(tolerance=tolerance, floor=1, at_most=0.99)
    gone = policy.decide(free, Size(1e4, 1e4), [1.0], {}).remove
    cost = sum(c.errors[len(gone[c.name]) - 1] for c in free if c.name in gone)
    assert cost <= tolerance + 1e-12
    left = [
        c.errors[n] - (c.errors[n - 1] if n else 0.0)
        for c in free
        if (n := len(gone.get(c.name, ()))) < len(c.errors)
    ]
    assert all(cost + rise > tolerance - 1e-12 for rise in left)


def test_units_give_way_to_those_that_gain_more() -> None:
    """A network that may not grow swaps: here what costs little goes, and then there is room there."""
    idle, steep = (
        group("idle", [0.01 * n for n in range(1, 7)], 3.0),
        group("steep", [9.0] * 6, 3.0, (0.5, 0.4)),
    )
    policy = Policy(grow=True, plateau=1.0, tolerance=0.0, max_parameters=100, floor=1)
    now = Size(100, 100)
    assert dict(policy.decide([idle, steep], now, [1.0, 1.0], {}).remove) == {"idle": (0, 1)}
    grown = policy.decide([idle, steep], Size(94, 94), [1.0, 1.0], {})
    assert dict(grown.expand) == {"steep": 2}
    dear = group("idle", [0.3 * n for n in range(1, 7)], 3.0)
    assert not policy.decide([dear, steep], now, [1.0, 1.0], {}).remove


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.0, 1.0))
def test_elimination_may_stop_early(seed: int, share: float) -> None:
    """Behind a limit it ends with the first error above it, and is the same until there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 10, generator=generator).double()
    c, w = x.T @ x / 64, torch.randn(5, 10, generator=generator).double()
    units = [[i] for i in range(10)]
    whole = backward(c, w, units)
    limit = share * float(whole.errors[-1])
    some = backward(c, w, units, limit=limit)
    n = len(some.order)
    assert some.order == whole.order[:n]
    assert torch.equal(some.errors, whole.errors[:n])
    assert n == len(whole.order) or float(some.errors[-1]) > limit
    assert all(float(e) <= limit for e in some.errors[:-1])


def test_a_policy_of_the_older_meaning_is_refused() -> None:
    data = Policy().to_dict()
    assert Policy.from_dict(data) == Policy()
    del data["tolerance_of"]
    with pytest.raises(SurgeryError, match="relative rise of the loss"):
        Policy.from_dict(data)

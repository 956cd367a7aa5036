"""Units that go pay for their share of what training gains: a young network keeps what it has not used yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.training.subjects import candidate
from tracker import NeuronEngine, Policy, Size
from tracker.training import policy as policies
from tracker.training.learning import falling

NOW = Size(100, 200)


def going(
    fall: float, dead: tuple[int, ...] = (), effect: float = float("inf"), **settings: Any
) -> int:
    policy = Policy(tolerance=0.2, at_most=0.9, floor=1, **settings)
    one = replace(candidate(dead=dead), effect=effect)  # 3 of 100 parameters each
    wanted = policy.decide([one], NOW, [1.0], {}, falling=fall)
    return len(wanted.remove.get("g", ()))


@given(st.lists(st.floats(0, 10), min_size=2, max_size=2).map(sorted))
def test_the_steeper_the_loss_falls_the_fewer_go(falls: list[float]) -> None:
    assert going(falls[0]) >= going(falls[1])


def test_what_goes_costs_its_share_of_what_the_group_does() -> None:
    """The second unit is a tenth of the loss: half of the tolerance, or all that its group does."""
    assert [going(0.0, effect=effect) for effect in (1.0, 0.5, 0.49, 0.0)] == [2, 2, 1, 1]


def test_what_goes_costs_its_share_of_the_gain() -> None:
    """Errors are 0, 0.1 and then 5; a unit has 3% of the parameters."""
    assert going(0.0) == 2
    assert going(1.6) == 2  # 0.1 + 1.6 · 6%
    assert going(1.7) == 1
    assert going(6.6) == 1
    assert going(6.7) == 0
    assert going(6.7, dead=(0,)) == 1  # what says nothing does not learn
    assert going(1e9, max_parameters=94) == 2  # a budget holds


@given(st.floats(0.1, 10), st.floats(0, 0.02), st.integers(4, 60), st.integers(1, 500))
def test_the_pace_is_that_of_the_losses(level: float, slope: float, steps: int, every: int) -> None:
    line = level - slope * level * torch.arange(steps).double() / steps
    half = steps // 2
    pace = (line[:half].mean() - line[half:].mean()) * 2 / steps * every / line[half:].mean()
    found = falling(line, every)
    assert 0.0 <= found <= float(pace) + 1e-9  # less what is chance
    assert falling(line.flip(0), every) < 1e-9
    assert falling(torch.full((steps,), level), every) < 1e-9
    assert falling(torch.full((steps,), float("nan")), every) == 0.0


def spirals(steps: int) -> int:
    """Units that are left of 128 after a look in the first steps of a task that takes thousands."""
    torch.manual_seed(0)
    arm, radius = torch.randint(0, 3, (1_000,)), torch.rand(1_000)
    angle = 9 * radius + 2 * torch.pi / 3 * arm
    x = 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    engine = NeuronEngine()
    engine.track_model(model, "young", x[:16])
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(Policy(warm_up=steps, every=100, look=8, settle=20))
    for _ in range(steps):
        batch = torch.randint(0, 1_000, (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), arm[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)
    assert len(engine.life) == 2
    return int(model[0].out_features) + int(model[2].out_features)


def test_a_young_network_keeps_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spirals(100) > 96
    monkeypatch.setattr(policies, "weighed", lambda errors, *rest: errors)
    assert spirals(100) == 64  # what prices of now would have let go

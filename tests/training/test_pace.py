"""How much by when: changes are spread over the part of a run in which it may change, whatever its length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tracker import NeuronEngine, Policy, SurgeryError
from tracker.training.choices import Candidate, Size

WIDE, LEAST = 2000, 400


def looked(
    policy: Policy, looks: int, width: int, cost: float, fails: frozenset[int]
) -> list[float]:
    """Parameters after each look of a network of one group; what some looks decide is taken back."""
    now, sizes = float(width), list[float]()
    for number in range(looks):
        # More can go than may, and each unit gains something.
        most = max(int(policy.at_most * now), 1)
        one = Candidate(
            "g", "g", int(now), tuple(range(most)), tuple(10.0 * (i + 1) for i in range(most)),
            Size(cost, 1.0), gains=(1.0,) * most,
        )  # fmt: skip
        wanted = policy.decide(
            [one], Size(now * cost, now), [1.0, 0.5], {}, looks_left=looks - 1 - number
        )
        moved = sum(wanted.expand.values()) - sum(map(len, wanted.remove.values()))
        if number not in fails:
            now += moved
        sizes.append(now * cost)
    return sizes


@settings(max_examples=60, deadline=None)
@given(
    looks=st.integers(2, 40),
    power=st.floats(1.0, 5.0),
    goal=st.integers(1000, 1900),
    grows=st.booleans(),
    fails=st.frozensets(st.integers(0, 39), max_size=3),
)
def test_what_is_left_of_the_way_follows_the_power(
    looks: int, power: float, goal: int, grows: bool, fails: frozenset[int]
) -> None:
    cost, width = 3.0, 1000 if grows else 2000
    policy = Policy(
        ramp=power,
        shrink=not grows,
        grow=grows,
        max_parameters=int(goal * cost),
        tolerance=0.0,
        at_most=0.9,
    )
    fails = frozenset(f for f in fails if f < looks - 1)
    sizes = looked(policy, looks, width, cost, fails)
    assert (
        abs(sizes[-1] - goal * cost) <= cost
    )  # the budget is met at the last look, whatever was taken back
    if not fails:
        for k, size in enumerate(sizes, start=1):
            left = (goal - width) * cost * (1 - k / looks) ** power
            assert abs(goal * cost - size - left) <= 2 * cost * k


def test_without_a_schedule_the_budget_is_met_at_once() -> None:
    policy = Policy(max_parameters=3000, tolerance=0.0, at_most=0.9)
    assert looked(policy, 3, 2000, 3.0, frozenset())[0] <= 3000
    ramped = dataclasses.replace(policy, ramp=3.0)
    wanted = looked(ramped, 1, 2000, 3.0, frozenset())
    assert wanted[0] <= 3000
    with pytest.raises(SurgeryError, match="ramp"):
        Policy(ramp=0.0)
    with pytest.raises(SurgeryError, match="newborn"):
        Policy(newborn=-1)


def lived(steps: int, policy: Policy) -> NeuronEngine:
    """A run of so many steps; the network is trained only where it is looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(64, 6)
    y = torch.randn(64, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(policy)
    run: Any = engine.trainer.run
    while run.steps < steps:
        to_look = -(run.steps - policy.warm_up) % policy.every
        if to_look > policy.look + 4:  # the clock goes on without training
            run.steps = min(run.steps + to_look - policy.look - 4, steps)
            continue
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)
    assert run.steps == steps
    return engine


@pytest.mark.parametrize("steps", [200, 200_000])
def test_changes_are_spread_over_runs_of_any_length(steps: int) -> None:
    policy = Policy.over(steps, max_parameters=163, tolerance=0.0, regret=1e9, floor=2, grow=False)
    engine = lived(steps, policy)
    changed = [d for d in engine.life if d.what == "pruned"]
    assert engine.life[-1].parameters <= 163
    assert all(0.1 * steps - 1 <= d.step <= 0.75 * steps for d in changed)
    looks = min(12, int(0.65 * steps) // 6)
    assert len(changed) >= looks * 2 / 3
    assert changed[-1].step - changed[0].step >= 0.35 * steps
    halves = [d.parameters for d in changed]
    assert halves == sorted(halves, reverse=True)

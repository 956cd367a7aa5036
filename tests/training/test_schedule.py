"""A run of known length: it looks, settles and ends by shares of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, Phases, Policy, SurgeryError


def life(length: int, policy: Any, **how: int) -> list[tuple[int, str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(64, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(policy, **how)
    for _ in range(length):
        loss = (model(x) - x[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)
    return [(decision.step, decision.what) for decision in engine.life[1:]]


@pytest.mark.parametrize("steps", [24, 60, 200])
def test_it_looks_within_the_run_and_leaves_the_end_in_peace(steps: int) -> None:
    told = life(steps, Policy.over(steps, tolerance=0.05, regret=1e9))
    assert told
    assert all(0.1 * steps - 1 <= step <= 0.75 * steps for step, _ in told)
    assert told == life(steps, Policy(tolerance=0.05, regret=1e9), steps=steps)


def test_what_is_said_is_kept_and_the_last_phase_is_fitted() -> None:
    assert Policy.over(1000, every=300, until=None).every == 300
    assert Policy(every=300).fitted(1000).every == 300
    phases = Phases([(0, Policy()), (500, Policy())]).fitted(1500)
    assert phases.parts[0][1] == Policy()
    assert phases.parts[1][1] == Policy.over(1000)
    assert Policy.from_dict(Policy.over(1000).to_dict()) == Policy.over(1000)
    assert life(60, lambda candidates, now, losses, blocked: None, steps=60)


@pytest.mark.parametrize("steps", [0, 23, -5, 1.5, True, "long", float("nan")])
def test_a_run_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(SurgeryError):
        Policy.over(steps)
    with pytest.raises(SurgeryError):
        life(0, None, steps=steps)
    with pytest.raises(SurgeryError, match="no 'evry'"):
        Policy.over(100, evry=3)

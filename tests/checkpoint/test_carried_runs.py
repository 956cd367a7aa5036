"""A run that a state dict carries goes on bit for bit, from whichever step it was saved at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.runs import POLICIES, same
from tracker import CheckpointError, NeuronEngine
from tracker.journal.state_dict_hooks import RUN

STEPS = 21


class Run:
    """A loop as users write it; the loss rises after each change."""

    def __init__(self, policy: Any, saved: Any = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
        )
        self.engine, self.step, self.saved = NeuronEngine(), 0, dict[int, Any]()
        self.engine.track_model(self.model, "run", example_inputs=torch.ones(2, 6))
        self.engine.carry_journal(run=True)
        if saved is not None:
            self.step = saved["step"]
            self.model.load_state_dict(saved["model"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.engine.attach_optimizer(self.optimizer)
        self.engine.start_self_modification(policy if saved is None else None)

    def go(self, keep: Any = ()) -> Run:
        while self.step < STEPS:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(self.step))
            loss = self.model(x).square().mean() * (5.0 if self.step % 6 < 3 else 1.0)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.engine.step(loss)
            self.step += 1
            if self.step in keep:
                self.saved[self.step] = copy.deepcopy(
                    {
                        "model": self.model.state_dict(),
                        "optimizer": self.optimizer.state_dict(),
                        "step": self.step,
                    }
                )
        return self

    @property
    def parts(self) -> Any:
        return self.model, self.engine, self.optimizer


# Before a look, in it, at a change, while its verdict is awaited, and when it is told.
POINTS = (2, 4, 6, 7, 9, 13, 16)


@pytest.mark.parametrize("name", POLICIES)
def test_goes_on_from_any_step(name: str) -> None:
    whole = Run(POLICIES[name]).go(keep=POINTS)
    assert len(whole.engine.life) > 2
    for step in POINTS:
        same(whole.parts, Run(POLICIES[name], whole.saved[step]).go().parts)


def test_a_change_that_was_loaded_can_be_undone() -> None:
    whole = Run(POLICIES["shrink"]).go(keep=(7,))
    saved = whole.saved[7]
    again = Run(None, saved)
    receipt = again.engine.undo()
    assert receipt.operation == "undo"
    assert [p.shape for p in again.model.parameters()] == [
        p.shape for p in Run(POLICIES["shrink"]).model.parameters()
    ]
    assert not len(again.engine.journal)
    for parameter, state in again.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_off_unless_asked_for() -> None:
    whole = Run(POLICIES["shrink"]).go()
    assert RUN in whole.model.state_dict()
    plain = NeuronEngine()
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    plain.track_model(model, example_inputs=torch.ones(2, 6))
    plain.carry_journal()
    plain.start_self_modification(POLICIES["shrink"])
    assert not [name for name in model.state_dict() if name.startswith("_tracker")]


@pytest.mark.parametrize("wrong", ["no bytes", "cut", "noise", "another type"])
def test_what_is_no_run_is_refused_and_changes_nothing(wrong: str) -> None:
    state = Run(POLICIES["shrink"]).go(keep=(13,)).saved[13]["model"]
    packed = state[RUN]
    bad: dict[str, Any] = {
        "no bytes": "run",
        "cut": packed[:-100],
        "noise": torch.randint(0, 256, packed.shape).byte(),
        "another type": packed.float(),
    }
    fresh = Run(POLICIES["shrink"])
    before = {k: v.clone() for k, v in fresh.model.named_parameters()}
    with pytest.raises(CheckpointError):
        fresh.model.load_state_dict({**state, RUN: bad[wrong]})
    assert all(torch.equal(before[k], v) for k, v in fresh.model.named_parameters())
    assert not len(fresh.engine.journal)

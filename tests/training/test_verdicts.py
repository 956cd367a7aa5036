"""Verdicts: what does nothing stays, also where the task changes; what hurts goes, by chance or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, Policy, Requests, SurgeryError


def lived(kind: str, *, switch: bool = False, regret: float = 0.1) -> list[str]:
    """Five changes of a network that learns noisy labels, each judged."""
    torch.manual_seed(0)
    x, model = torch.randn(4000, 10), nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    y = (x @ torch.randn(10, 4) + torch.randn(4000, 4)).argmax(1)
    criterion = nn.CrossEntropyLoss()
    opt: Any = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        some = torch.randint(4000, (128,))
        opt.zero_grad()
        criterion(model(x[some]), y[some]).backward()
        opt.step()
    opt = torch.optim.SGD(model.parameters(), 1e-4)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:8])
    engine.attach_optimizer(opt)

    def rule(candidates: Any, *args: Any) -> Requests:
        if kind == "nothing":
            return Requests("one more", expand={candidates[0].name: 1})
        return Requests("much", remove={candidates[0].name: tuple(range(16))})

    engine.start_self_modification(
        Policy.of(rule, warm_up=10, every=30, look=8, settle=20, patience=0, regret=regret)
    )
    run: Any = engine.trainer.run
    if kind == "harm":
        run._do = lambda wanted, policy: engine.prune_units(wanted.remove, compensate=False)
    for step in range(155):
        some = torch.randint(4000, (24,))
        labels = y[some] if not switch or step < 45 else (y[some] + 1) % 4
        opt.zero_grad()
        loss = criterion(model(x[some]), labels)
        loss.backward()
        opt.step()
        receipt = engine.step(loss)
        if receipt is not None and regret == math.inf:
            with pytest.raises(SurgeryError, match="no change to undo"):
                engine.undo()
    return [d.what for d in engine.life if d.what != "kept"]


@pytest.mark.parametrize("switch", [False, True])
def test_what_changes_nothing_is_not_taken_back(switch: bool) -> None:
    assert lived("nothing", switch=switch) == ["expanded"] * 5


def test_what_raises_the_loss_is_taken_back() -> None:
    assert lived("harm") == ["pruned", "undone"] * 5


def test_without_regret_nothing_is_taken_back_or_kept_for_it() -> None:
    assert lived("harm", regret=math.inf)[0] == "pruned"
    assert "undone" not in lived("harm", regret=math.inf)

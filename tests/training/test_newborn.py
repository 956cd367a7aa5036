"""New units get time, silent ones a new start; ages are those of the journal; early weights come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.subjects import QUICK
from tracker import NeuronEngine, Policy, Requests, SurgeryError

Rule = Any


def running(rule: Rule, width: int = 12, **settings: Any) -> tuple[NeuronEngine, Any, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    x = torch.randn(48, 6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    own = {**QUICK, "regret": 1e9, **settings}
    policy = Policy(**own) if rule is None else Policy.of(rule, **own)
    engine.start_self_modification(policy)
    return engine, model, optimizer, x


def train(engine: NeuronEngine, model: Any, optimizer: Any, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        loss = (model(x) - x[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)


@pytest.mark.parametrize("newborn", [0, 1, 3])
def test_a_new_unit_is_left_alone_at_so_many_looks(newborn: int) -> None:
    """What grew at the first look is wanted away at all others, and stays as long as it is new."""
    grew: list[int] = []

    def rule(candidates: Any, *args: Any, step: int) -> Requests:
        if not grew:
            grew.append(step)
            return Requests("more", expand={candidates[0].name: 2})
        return Requests("the last two", remove={candidates[0].name: (12, 13)})

    engine, *rest = running(rule, newborn=newborn, patience=0)
    old = {i for t in engine.get_neuron_ages().values() for i in t}
    train(engine, *rest, 70)
    decisions = [d for d in engine.life if d.what != "kept"]
    assert [d.what for d in decisions[: newborn + 2]] == [
        "expanded",
        *["refused"] * newborn,
        "pruned",
    ]
    assert all("protected" in d.why for d in decisions[1 : newborn + 1])
    left = {i for t in engine.get_neuron_ages().values() for i in t}
    assert left == old  # the two that came are those that went


def test_ages_are_told_from_the_journal(tmp_path: Any) -> None:
    def rule(candidates: Any, *args: Any) -> Requests:
        return Requests("more", expand={candidates[0].name: 1})

    engine, model, optimizer, x = running(rule)
    other = NeuronEngine()
    other.track_model(nn.Sequential(nn.Linear(2, 2)), "o")
    with pytest.raises(SurgeryError, match="start_self_modification"):
        other.get_neuron_ages()
    train(engine, model, optimizer, x, 50)
    run: Any = engine.trainer.run
    came = {i: e.step for e in engine.journal for i in e.added_ids}
    ages = engine.get_neuron_ages()
    assert len(came) >= 3
    assert {i: a for t in ages.values() for i, a in t.items()} == {
        i: run.steps - came.get(i, 0) for t in ages.values() for i in t
    }
    engine.save_checkpoint(tmp_path / "run")
    fresh = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    resumed = NeuronEngine.load_checkpoint(
        tmp_path / "run", fresh, torch.optim.Adam(fresh.parameters(), 1e-3)
    )
    assert resumed.get_neuron_ages() == ages
    # A run that is started anew counts from its own beginning.
    engine.start_self_modification(Policy.of(rule, **QUICK))
    assert {a for t in engine.get_neuron_ages().values() for a in t.values()} == {0}
    engine.start_tracking(enable_correlation_analysis=True)
    model(x)
    report = engine.save_report_to_file(tmp_path / "report.txt", include_heatmap=False).read_text()
    assert "PLASTICITY" in report
    assert f"{len(ages['0'])}" in report


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.3])
def test_units_below_the_threshold_get_a_new_start(tau: float) -> None:
    """Against the activations of the passes themselves."""
    engine, model, optimizer, x = running(
        None, shrink=False, recycle=True, dormant=tau, newborn=0, width=16
    )
    with torch.no_grad():
        model[0].weight[:4] *= torch.tensor([1e-4, 0.02, 0.15, 0.3])[:, None]
        model[0].bias[:4] = 0
        model[0].bias[4] = -100.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    h = torch.relu(model[0](x)).mean(0).detach()
    dormant = (h <= tau * h.mean()).nonzero().flatten().tolist()
    before = list(engine.get_neuron_ages()["0"])
    train(engine, model, optimizer, x, 10)
    after = list(engine.get_neuron_ages()["0"])
    assert [i for i in range(16) if before[i] != after[i]] == dormant
    assert len(dormant) == {0.0: 1, 0.05: 3, 0.3: 4}[tau] or len(dormant) > 1


def test_early_weights_come_back_in_the_architecture_of_now() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    x, optimizer = torch.randn(48, 6), torch.optim.Adam(model.parameters(), 1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    early = copy.deepcopy(model)
    first = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match="attach_follower"):
        engine.rewind(early)
    engine.attach_follower(early)
    parameters = list(model.parameters())
    train(engine, model, optimizer, x, 5)
    engine.prune_neurons({"0": [1, 4, 5]}, compensate=False)
    train(engine, model, optimizer, x, 3)
    engine.rewind(early)
    kept = [i for i in range(12) if i not in (1, 4, 5)]
    now = model.state_dict()
    for name, tensor in first.items():
        rows = tensor[:, kept] if name == "3.weight" else tensor
        assert torch.equal(now[name], rows[kept] if name[0] in "01" and rows.ndim else rows)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not optimizer.state
    with pytest.raises(SurgeryError):
        engine.undo()
    train(engine, model, optimizer, x, 3)
    assert not torch.equal(early[0].weight, model[0].weight)


def test_ids_that_are_protected_leave_room_for_few() -> None:
    """More could go than is not protected."""
    engine, *rest = running(None, tolerance=10.0, at_most=0.9, protect=(0, 1, 2, 3, 4, 5, 6, 7))
    train(engine, *rest, 30)
    assert set(range(8)) <= set(engine.get_neuron_ages()["0"])
    assert any(d.what == "pruned" for d in engine.life)

"""A network that changes itself while it trains: what must hold whatever the policy does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.surgery.subjects import MODELS, OPTIMIZERS, holds_exactly_the_live, mlp, prepared
from tests.training.subjects import QUICK, candidate, trained
from tracker import NeuronEngine, Phases, Policy, SurgeryError
from tracker.training.policy import Candidate, Size


def run(policy: Policy, steps: int = 60, seed: int = 0, name: str = "mlp") -> tuple[Any, ...]:
    model, opt, engine, x = prepared(name)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 30, 0.5)
    engine.start_self_modification(policy)
    receipts = trained(model, opt, engine, x, steps, seed=seed, after=schedule.step)
    engine.stop_self_modification()
    return model, opt, engine, receipts


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([1e-6, 1e-2, 0.3]),
    st.sampled_from([0.3, 0.8]),
    st.booleans(),
    st.sampled_from(["mlp", "conv"]),
)
def test_invariants_hold_for_any_policy(
    tolerance: float, at_most: float, grow: bool, name: str
) -> None:
    policy = Policy(
        **QUICK, tolerance=tolerance, at_most=at_most, grow=grow, plateau=0.9, max_parameters=4000
    )
    model, _, engine, _ = run(policy, 48, name=name)
    ids = [i for layer in engine.track_model(model).values() for i in layer]
    assert len(ids) == len(set(ids))
    assert all(g.size >= 2 for g in engine.structure.groups if g.prunable)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))
    assert engine.life[0].step == 0
    assert all(d.why for d in engine.life)


def test_same_seed_same_structure() -> None:
    policy = Policy(**QUICK, tolerance=0.05, grow=True, plateau=0.9)
    first, second = (run(policy) for _ in range(2))
    assert [d.widths for d in first[2].life] == [d.widths for d in second[2].life]
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_says_nothing_goes_and_the_journal_knows() -> None:
    model, opt, engine, x = prepared("mlp")
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, -5.0
    engine.start_self_modification(Policy(**QUICK, tolerance=1e-9))
    for _ in range(24):
        loss = model(x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        engine.step(loss)
    assert 1 in [i for entry in engine.journal for i in entry.removed_ids]
    assert model[0].out_features < 12
    assert [d.what for d in engine.life][1] == "pruned"


def test_a_change_that_hurts_is_undone_and_not_repeated_soon() -> None:
    """Of a network that needs all it has, most is taken: the loss rises, and it comes back."""
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh), torch.randn(400, 6)
    target = torch.randn(400, 4)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x[:8])
    engine.attach_optimizer(opt)
    engine.start_self_modification(
        Policy(warm_up=300, every=40, look=8, settle=4, tolerance=10.0, at_most=0.9, floor=1, regret=0.01)
    )  # fmt: skip
    for _ in range(400):
        loss = (model(x) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        engine.step(loss)
    what = [d.what for d in engine.life]
    assert what[1:3] == ["pruned", "undone"]
    assert what[3:5] == ["kept", "kept"]
    assert model[0].out_features == 12
    assert len(engine.journal) == 0


def test_the_budget_binds() -> None:
    least = 120
    model, *_ = run(Policy(**QUICK, tolerance=10.0, at_most=0.9, min_parameters=least), 60)
    assert sum(p.numel() for p in model.parameters()) >= least
    model, *_ = run(
        Policy(**QUICK, shrink=False, grow=True, plateau=0.99, at_most=0.9, max_parameters=300), 80
    )
    assert 237 < sum(p.numel() for p in model.parameters()) <= 300


def test_policies_are_plain_data() -> None:
    policy = Policy(tolerance=0.5, grow=True)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert "tolerance=0.5" in str(policy)
    for bad in ({"every": 0}, {"every": 10, "look": 8, "settle": 8}, {"at_most": 1.0}):
        with pytest.raises(SurgeryError):
            Policy(**bad)
    with pytest.raises(SurgeryError, match="no 'evil'"):
        Policy.from_dict({"evil": 1})
    phases = Phases([(0, policy), (500, Policy(recycle=True, max_flops=10**6))])
    assert Policy.from_dict(json.loads(json.dumps(phases.to_dict()))) == phases
    assert phases.at(499) == (0, policy)
    assert phases.at(500)[0] == 500
    for bad in ([], [(1, policy)], [(0, policy), (0, policy)], [(0.0, policy)]):
        with pytest.raises(SurgeryError, match="Phases begin"):
            Phases(bad)
    for broken in ({"phases": 3}, {"phases": [3]}, {"phases": [[0, {}]], "every": 3}):
        with pytest.raises(SurgeryError, match="hase"):
            Policy.from_dict(broken)


def test_what_a_policy_decides() -> None:
    """Numbers in, requests out: no network needed."""
    now, one = Size(100, 200), candidate()
    wanted = Policy(tolerance=0.2).decide([one], now, [1.0], {})
    assert dict(wanted.remove) == {"g": (0, 1)}
    assert not Policy(tolerance=0.2).decide([one], now, [1.0], {"g": 1}).groups
    assert not Policy(tolerance=0.2, min_parameters=98).decide([one], now, [1.0], {}).groups
    assert dict(Policy(tolerance=0.2, min_flops=190).decide([one], now, [1.0], {}).remove) == {
        "g": (0,)
    }
    # Beyond its budget it shrinks beyond the tolerance too, as far as it may at a time and no further than needed.
    tight = Policy(tolerance=0.0, max_parameters=94)
    assert dict(tight.decide([one], now, [1.0], {}).remove) == {"g": (0, 1)}
    assert len(Policy(max_flops=20).decide([one], now, [1.0], {}).remove["g"]) == 5
    assert len(Policy(max_flops=20, floor=8).decide([one], now, [1.0], {}).remove["g"]) == 2
    # From where it loses least for what it costs, unit by unit.
    cheap = Candidate("c", "c", 10, tuple(range(9)), (0.1, 0.2, 9.0, *[99.0] * 6), Size(3, 6))
    dear = Candidate("d", "d", 10, tuple(range(9)), (0.4, 0.8, 1.2, *[99.0] * 6), Size(3, 6))
    tight = Policy(tolerance=0.0, max_parameters=88)
    both = tight.decide([dear, cheap], now, [1.0], {}).remove
    assert {name: len(units) for name, units in both.items()} == {"c": 2, "d": 2}
    # What says nothing goes, or gets a new start.
    quiet = candidate(dead=(4,))
    assert dict(Policy(recycle=True).decide([quiet], now, [1.0], {}).recycle) == {"g": (4,)}
    assert not Policy(tolerance=0.2).decide([quiet], now, [1.0], {}).recycle
    # Growth: once the loss stands still, where it pays, within the budget.
    grow = Policy(shrink=False, grow=True, plateau=0.1, at_most=0.5)
    busy = Candidate("b", "b", 10, tuple(range(9)), (1.0,) * 9, Size(3, 6))
    idle = Candidate("i", "i", 10, tuple(range(9)), (0.1,) * 9, Size(3, 6))
    assert not grow.decide([busy, idle], now, [1.0, 0.8], {}).groups
    assert dict(grow.decide([busy, idle], now, [1.0, 0.95], {}).expand) == {"b": 5}
    assert dict(grow.decide([busy, busy], now, [1.0, 0.95], {}).expand) == {"b": 5}
    for bound, count in (
        ({"ceiling": 12}, 2),
        ({"max_parameters": 110}, 3),
        ({"max_flops": 212}, 2),
    ):
        wanted = replace(grow, **bound).decide([busy], now, [1.0, 1.0], {})
        assert dict(wanted.expand) == {"b": count}
    assert not replace(grow, ceiling=10).decide([busy], now, [1.0, 1.0], {}).groups


def test_what_says_nothing_gets_a_new_start() -> None:
    model, opt, engine, x = prepared("mlp")
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, -5.0
    ids = engine.track_model(model)["0"]
    old, width = ids[1], model[0].out_features
    expected = model(x).detach()
    engine.start_self_modification(Policy(**QUICK, recycle=True, shrink=False))
    for _ in range(10):
        receipt = engine.step(1.0)  # no training: the function must not move
        model(x)
    assert receipt is not None
    assert receipt.operation == "recycle_neurons"
    assert [d.what for d in engine.life] == ["kept", "recycled"]
    assert old in receipt.removed_ids
    assert old not in engine.track_model(model)["0"]
    assert old in ids  # what was returned stays as it was
    assert model[0].out_features == width
    assert torch.allclose(model(x), expected, atol=1e-6)
    holds_exactly_the_live(model, opt)


def test_phases_follow_each_other() -> None:
    """First it grows, all layers that pay at once; then it shrinks below a bound."""
    shrink = Policy(**QUICK, max_parameters=200)
    grow = Policy(
        **{**QUICK, "warm_up": 4}, shrink=False, grow=True, plateau=1.0, max_parameters=400
    )
    model, _, engine, _ = run(Phases([(0, grow), (40, shrink)]), 120)
    what = [(d.step, d.what) for d in engine.life]
    assert {w for step, w in what if 0 < step <= 40} == {"expanded", "kept"}
    assert "pruned" in {w for step, w in what if step > 50}
    assert min(step for step, _ in what if step > 40) == 50
    assert max(d.parameters for d in engine.life) > 300
    assert sum(p.numel() for p in model.parameters()) <= 200


def test_a_verdict_takes_back_no_change_but_its_own() -> None:
    policy = Policy(**QUICK, tolerance=10.0, at_most=0.3, regret=0.01)
    for by_hand in (False, True):
        model, _, engine, x = prepared("mlp")
        engine.start_self_modification(policy)
        for step in range(1, 17):
            model(x)
            changed = engine.step(float(step))
            if changed is not None and by_hand:
                engine.expand_layer("0", 1)
        assert [e.operation for e in engine.journal] == ["prune_units", "expand_layer"] * by_hand
        assert ("undone" in [d.what for d in engine.life]) is not by_hand


def test_a_run_keeps_to_its_model_and_stops_when_told() -> None:
    model, _, engine, x = prepared("mlp")
    engine.start_self_modification(Policy(**QUICK, tolerance=10.0, regret=1e9))
    other = mlp()
    engine.track_model(other, "other", example_inputs=x)
    shapes = [p.shape for p in other.parameters()]
    receipts = []
    for _ in range(12):
        model(x)
        receipts.append(engine.step(1.0))
    assert any(receipts)
    assert [p.shape for p in other.parameters()] == shapes
    assert not engine.journal  # of the other model, which is the current one
    engine.stop_self_modification()
    before, life = [p.shape for p in model.parameters()], list(engine.life)
    for _ in range(24):
        model(x)
        assert engine.step(1.0) is None
    assert [p.shape for p in model.parameters()] == before
    # The first loss is not known, and nan is unequal to itself.
    assert list(map(str, engine.life)) == list(map(str, life))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["compiled", "recomputed"])
def test_the_same_life_however_the_passes_are_run(way: str) -> None:
    """Looks see what compiled graphs compute, and see what checkpointing recomputes once."""

    def lived(how: str) -> tuple[list[Any], list[torch.Tensor]]:
        model, opt, engine, x = prepared("mlp")
        run: Any = model
        if how == "compiled":
            torch._dynamo.reset()
            run = torch.compile(model, backend="aot_eager")
        elif how == "recomputed":
            run = partial(checkpoint, model, use_reentrant=False)
        policy = Policy(
            **QUICK, tolerance=0.02, grow=True, plateau=1.0, max_parameters=400, regret=9.0,
            gradients=way != "compiled",  # a look does not see those of compiled graphs
        )  # fmt: skip
        engine.start_self_modification(policy)
        for _ in range(40):
            loss = run(x).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            engine.step(loss)
        life = [(d.step, d.what, d.parameters) for d in engine.life]
        return life, [p.detach() for p in model.parameters()]

    plain, other = lived("plain"), lived(way)
    assert plain[0] == other[0]
    assert len({parameters for _, _, parameters in plain[0]}) > 1
    for a, b in zip(plain[1], other[1], strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_what_makes_no_sense_is_refused_in_words() -> None:
    _model, _, engine, _ = prepared("mlp")
    assert engine.step(0.5) is None  # one script serves with and without a run
    with pytest.raises(SurgeryError, match="a Policy, Phases, a function"):
        engine.start_self_modification({"every": 3})  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match=r"\(step, policy\)"):
        Phases("ab")  # type: ignore[arg-type]
    engine.start_self_modification()
    for loss in (torch.ones(3), "x", None):
        with pytest.raises(SurgeryError, match="one number"):
            engine.step(loss)  # type: ignore[arg-type]
    engine.step(torch.ones(1, 1))


@pytest.mark.parametrize("at", [3, 19, 23, 30, 41])
@pytest.mark.parametrize("name", ["mlp", "conv", "phases"])
def test_a_resumed_run_does_what_it_would_have_done(at: int, name: str, tmp_path: Path) -> None:
    policy: Policy | Phases = Policy(**QUICK, tolerance=0.02, grow=True, plateau=0.9, regret=1e9)
    if name == "phases":
        name, policy = "mlp", Phases([(0, policy), (35, replace(policy, max_parameters=150))])
    model, opt, engine, x = prepared(name)
    target = torch.randn(len(x), model(x).shape[1])

    def go(model: nn.Module, opt: Any, engine: NeuronEngine, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (model(x) - target).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            engine.step(loss)
            losses.append(float(loss.detach()))
        return losses

    engine.start_self_modification(policy)
    go(model, opt, engine, at)
    opt.zero_grad()
    engine.save_checkpoint(tmp_path / "run")
    torch.manual_seed(1)
    other = MODELS[name][0]()
    other_opt = OPTIMIZERS["Adam"](other.parameters())
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert go(model, opt, engine, 40) == go(other, other_opt, resumed, 40)
    assert str(resumed.life) == str(engine.life)
    assert len(engine.journal) > 0
    assert [e.step for e in resumed.journal] == [e.step for e in engine.journal]
    assert all(e.step is not None for e in engine.journal)


@pytest.mark.parametrize("undone", [False, True])
def test_a_change_in_the_middle_of_a_look_begins_it_anew(undone: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-3), torch.randn(64, 6)
    engine = NeuronEngine()
    engine.track_model(model, "mlp", example_inputs=x)
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(
        Policy(
            warm_up=0, every=12, look=8, settle=4, floor=2, grow=True, plateau=1.0, tolerance=0.0
        )
    )
    for step in range(1, 13):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.step(loss.detach())
        if step == 7:  # it observes
            engine.prune_neurons({"0": [1, 5]})
            if undone:
                engine.undo()
    # What it saw since was enough to decide, and is of the network as it is.
    assert [decision.step for decision in engine.life] == ([0, 12] if undone else [0, 7, 12])
    assert engine.tracker.current.reads["2.weight"].covariance.count.tolist() == [4 * 64] * (
        12 if undone else 10
    )


def test_the_life_tells_what_was_changed_by_hand_and_keeps_it_in_checkpoints(
    tmp_path: Path,
) -> None:
    model, opt, engine, x = prepared("mlp")
    engine.start_self_modification(Policy(warm_up=1000))

    def told() -> list[tuple[int, str, str, int]]:
        return [(d.step, d.what, d.why, d.parameters) for d in engine.life[1:]]

    sizes = [engine.count_parameters()]
    engine.compress(0.8, batches=x.split(8), progress=False)
    sizes.append(engine.count_parameters())
    engine.save_checkpoint(tmp_path / "run")  # before any step
    trained(model, opt, engine, x, 3)
    assert told() == [(0, "compressed", "by hand", sizes[1])]
    engine.undo()
    trained(model, opt, engine, x, 1)
    assert told()[1:] == [(3, "undone", "by hand", sizes[0])]
    fresh, other, *_ = prepared("mlp")
    again = NeuronEngine.load_checkpoint(tmp_path / "run", fresh, other)
    assert [(d.step, d.what, d.parameters) for d in again.life[1:]] == [(0, "compressed", sizes[1])]
    trained(fresh, other, again, x, 2)
    assert len(again.life) == 2
    assert again.plot_life() is not None

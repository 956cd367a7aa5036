"""Policies that merge, insert and remove layers: what they choose, what must hold whatever they do, what is undone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.surgery.subjects import MODELS, OPTIMIZERS, holds_exactly_the_live, mlp, prepared
from tests.training.subjects import QUICK, candidate, trained
from tracker import NeuronEngine, Policy, SurgeryError, apply_journal
from tracker.training.policy import Bypass, Candidate, Size

NOW = Size(100, 200)


# Decisions: numbers in, requests out.


def test_what_is_merged() -> None:
    pairs, errors = ((0, 1), (2, 3), (4, 5)), (0.0, 0.1, 5.0)
    one = replace(candidate(), pairs=pairs, merge_errors=errors)
    policy = Policy(merge=True, tolerance=0.2)
    assert dict(policy.decide([one], NOW, [1.0], {}).merge) == {"g": pairs[:2]}
    assert dict(replace(policy, floor=9).decide([one], NOW, [1.0], {}).merge) == {"g": pairs[:1]}
    assert dict(replace(policy, at_most=0.1).decide([one], NOW, [1.0], {}).merge) == {
        "g": pairs[:1]
    }
    least = replace(policy, min_parameters=96)
    assert dict(least.decide([one], NOW, [1.0], {}).merge) == {"g": pairs[:1]}
    assert not policy.decide([one], NOW, [1.0], {"g": 1}).groups
    assert dict(replace(policy, merge=False).decide([one], NOW, [1.0], {}).remove) == {"g": (0, 1)}


def test_where_a_layer_is_inserted() -> None:
    full = Candidate("f", "f", 4, (0, 1, 2), (1.0,) * 3, Size(3, 6), deeper=Size(40, 80))
    idle = Candidate("i", "i", 4, (0, 1, 2), (0.1,) * 3, Size(3, 6), deeper=Size(40, 80))
    grow = Policy(shrink=False, insert=1, plateau=0.1)
    still = [1.0, 0.95]
    assert grow.decide([idle, full], NOW, still, {}).insert == ("f",)
    assert grow.decide([idle, full], NOW, still, {"f": 1}).insert == ("i",)
    assert not grow.decide([idle, full], NOW, [1.0, 0.8], {}).groups
    assert not grow.decide([idle, full], NOW, still, {}, inserted=1).groups
    assert not replace(grow, max_flops=279).decide([full], NOW, still, {}).groups
    assert replace(grow, max_flops=280).decide([full], NOW, still, {}).groups == ("f",)
    # What can be expanded is expanded first.
    assert not replace(grow, grow=True).decide([full], NOW, still, {}).insert
    assert replace(grow, grow=True, ceiling=4).decide([full], NOW, still, {}).insert == ("f",)
    assert not grow.decide([replace(full, deeper=None)], NOW, still, {}).groups


def test_which_layer_goes() -> None:
    some = [Bypass("a", 0.1, Size(10, 20)), Bypass("b", 0.05, Size(50, 20))]
    policy = Policy(shrink=False, drop=0.2)

    def dropped(policy: Policy, blocked: dict[str, int] | None = None) -> tuple[str, ...]:
        return policy.decide([], NOW, [1.0], blocked or {}, bypasses=some).drop

    assert dropped(policy) == ("b",)
    assert dropped(policy, {"b": 1}) == ("a",)
    assert dropped(replace(policy, min_parameters=60)) == ("a",)
    assert dropped(replace(policy, drop=0.04)) == ()
    why = replace(policy, drop=0.04).decide([], NOW, [1.0], {}, bypasses=some).why
    assert "without b the outputs would err by 0.05" in why
    some = [Bypass("narrow", 0.0, Size(-30, 0))]  # what reads it would grow
    assert dropped(replace(policy, max_parameters=120)) == ()
    assert dropped(replace(policy, max_parameters=130)) == ("narrow",)


def test_new_actions_are_plain_data_too() -> None:
    policy = Policy(merge=True, insert=2, drop=0.1, gradients=False)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert "insert=2" in str(policy)
    for bad in ({"insert": -1}, {"drop": -0.1}, {"drop": float("nan")}):
        with pytest.raises(SurgeryError, match=r"insert|drop"):
            Policy(**bad)
    usual = Policy()
    assert (usual.merge, usual.insert, usual.drop) == (False, 0, 0.0)


# Runs.


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mlp", "conv", "gated", "residual"]),
    merge=st.booleans(),
    insert=st.integers(0, 3),
    drop=st.sampled_from([0.0, 0.05, 0.9]),
    shrink=st.booleans(),
    grow=st.booleans(),
    recycle=st.booleans(),
    tolerance=st.sampled_from([1e-6, 0.05, 0.5]),
    regret=st.sampled_from([0.0, 0.5]),
    most=st.sampled_from([None, 2500]),
)
def test_invariants_hold_for_any_policy(name: str, most: int | None, **options: Any) -> None:
    policy = Policy(**QUICK, **options, plateau=0.9, max_parameters=most)
    model, opt, engine, x = prepared(name)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    before = sum(p.numel() for p in model.parameters())
    engine.start_self_modification(policy)
    trained(model, opt, engine, x, 48)
    ids = [i for layer in engine.track_model(model).values() for i in layer]
    assert len(ids) == len(set(ids))
    widths = {n: len(v) for n, v in engine.track_model(model).items()}
    for n, width in widths.items():
        module: Any = model.get_submodule(n)
        if isinstance(module, nn.Linear):
            assert module.out_features == width == len(module.weight)
    assert sum(p.numel() for p in model.parameters()) <= max(before, most or 10**9)
    assert sum(n.endswith("inserted") for n, _ in model.named_modules()) <= options["insert"]
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) <= hooks
    assert all(d.why for d in engine.life)
    assert all(e.step is not None for e in engine.journal)
    done = [d.what for d in engine.life if d.what not in ("kept", "undone", "refused")]
    undone = [d.what for d in engine.life if d.what == "undone"]
    assert len({e.step for e in engine.journal}) == len(done) - len(undone)
    # What the journal says is the network.
    replayed = MODELS[name][0]()
    engine.journal.replay(replayed)
    assert [p.shape for p in replayed.parameters()] == [p.shape for p in model.parameters()]


def test_twins_are_folded_and_the_function_stays() -> None:
    model, _, engine, x = prepared("mlp")
    with torch.no_grad():
        for layer in (model[0],):
            layer.weight[3], layer.bias[3] = 2 * layer.weight[5], 2 * layer.bias[5]
    expected = model(x).detach()
    engine.start_self_modification(Policy(**QUICK, merge=True, shrink=False, tolerance=1e-9))
    for _ in range(10):
        receipt = engine.step(1.0)
        model(x)
    assert receipt is not None
    assert receipt.operation == "merge_neurons"
    assert [d.what for d in engine.life] == ["kept", "merged"]
    assert model[0].out_features == 11
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_the_predicted_error_of_merging_is_the_one_that_comes(name: str) -> None:
    """tr(W E[r rᵀ] Wᵀ) of all pairs together, measured at what the consumers put out."""
    from tracker.training.candidates import CostModel, candidates

    model, _, engine, x = prepared(name)
    model.eval()
    engine.correlation_threshold = 0.05
    engine.calibrate([x])
    found = candidates(
        engine.tracker,
        Policy(merge=True, floor=1, gradients=False),
        CostModel({}, 0.0),
        engine.correlation_threshold,
    )
    one = next(c for c in found if len(c.pairs) > 2)
    errors = list(one.merge_errors)
    assert all(e >= 0 for e in errors)
    group = next(g for g in engine.structure.groups if g.name == one.name)
    reader = next(t for (t, _), role in group.roles.items() if role == "reads").rpartition(".")[0]
    seen: list[torch.Tensor] = []
    model.get_submodule(reader).register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    model(x)
    layer = engine.track_model(model)[one.layer]
    engine.merge_neurons([(layer[k], layer[d]) for k, d in one.pairs[:3]])
    seen[1:] = []
    model(x)
    before, after = (s.double().movedim(1, -1).flatten(0, -2) for s in (seen[0], seen[-1]))
    lost = (after - before).square().mean(0).sum() / before.var(0, correction=0).sum()
    assert float(lost) == pytest.approx(errors[2], rel=0.05 if name == "mlp" else 0.3)


def test_a_layer_comes_once_the_loss_stands_still_and_nothing_is_lost() -> None:
    model, opt, engine, x = prepared("mlp")
    engine.start_self_modification(Policy(**QUICK, shrink=False, insert=1, plateau=1.0))
    receipts = trained(model, opt, engine, x, 48)
    assert [r.operation for r in receipts] == ["insert_layer"]
    assert receipts[0].promise == "exact"
    assert [d.what for d in engine.life][:3] == ["kept", "kept", "inserted"]


def test_a_block_that_does_nothing_goes() -> None:
    model, opt, engine, x = prepared("residual")
    with torch.no_grad():
        for p in model.blocks[1][3].parameters():
            p.zero_()
    expected = model(x).detach()
    engine.start_self_modification(Policy(**QUICK, shrink=False, drop=1e-6))
    model.train()
    for _ in range(10):
        receipt = engine.step(1.0)
        model(x)
    assert receipt is not None
    assert receipt.operation == "remove_layer"
    assert "blocks.1" in engine.life[-1].why
    assert engine.life[-1].what == "dropped"
    assert torch.allclose(model(x), expected, atol=1e-4)
    assert sum(p.numel() for p in model.blocks[1].parameters()) == 0
    holds_exactly_the_live(model, opt)


@pytest.mark.parametrize("what", ["merged", "inserted", "dropped"])
def test_what_hurts_is_taken_back_bit_for_bit(what: str) -> None:
    """The loss is told to be none any more: all is as before, and left alone for a while."""
    options: dict[str, Any] = {
        "merged": {"merge": True, "tolerance": 9.0},
        "inserted": {"insert": 1, "plateau": 1.0},
        "dropped": {"drop": 0.9},
    }[what]
    model, opt, engine, x = prepared("mlp")
    engine.correlation_threshold = 0.05
    model.train()
    policy = Policy(**QUICK, **options, shrink=False, regret=0.01, patience=2)
    engine.start_self_modification(policy)
    for step in range(34):
        model(x)
        before = [p.detach().clone() for p in model.parameters()]
        names = [n for n, _ in model.named_modules()]
        if engine.step(float(step)) is not None:
            break
    assert engine.life[-1].what == what
    changed = [p.shape for p in model.parameters()]
    assert changed != [p.shape for p in before]
    for _ in range(8):
        model(x)
        engine.step(float("inf"))
    assert engine.life[-1].what == "undone"
    assert names == [n for n, _ in model.named_modules()]
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)
    holds_exactly_the_live(model, opt)
    assert len(engine.journal) == 0
    place = {"merged": "", "inserted": "cost: 0", "dropped": "without 2 "}[what]
    assert place in engine.life[-2].why
    model.train()
    for later in range(12):  # left alone at the next look
        model(x)
        engine.step(200.0 + later)
    assert engine.life[-1].step > engine.life[-2].step
    assert engine.life[-1].what == "kept" or place not in engine.life[-1].why


def test_a_refusal_is_a_line_of_the_life(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, engine, x = prepared("mlp")

    def refused(*args: object, **kwargs: object) -> None:
        raise SurgeryError("not today")

    monkeypatch.setattr(engine.surgeon, "insert_layer", refused)
    engine.start_self_modification(Policy(**QUICK, shrink=False, insert=1, plateau=1.0))
    for _ in range(22):
        model(x)
        engine.step(1.0)
    assert (engine.life[-1].what, engine.life[-1].why) == ("refused", "not today")


@pytest.mark.parametrize("at", [19, 21, 30])
def test_a_resumed_run_does_what_it_would_have_done(at: int, tmp_path: Any) -> None:
    """In the middle of a look too: gradients and inputs that it saw are in the checkpoint."""
    policy = Policy(
        **QUICK, merge=True, insert=1, drop=0.3, grow=True, plateau=0.9, tolerance=0.02,
        max_parameters=260, regret=1e9,
    )  # fmt: skip
    model, opt, engine, x = prepared("mlp")
    model.train()
    engine.start_self_modification(policy)

    def go(model: nn.Module, opt: Any, engine: NeuronEngine, start: int, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            generator = torch.Generator().manual_seed(start + step)
            some = x[torch.randint(len(x), (60,), generator=generator)]
            loss = (model(some) - some[:, :4]).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            engine.step(loss)
            losses.append(float(loss.detach()))
        return losses

    go(model, opt, engine, 0, at)
    opt.zero_grad()
    engine.save_checkpoint(tmp_path / "run")
    torch.manual_seed(1)
    other = mlp()
    other_opt = OPTIMIZERS["Adam"](other.parameters())
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert go(model, opt, engine, at, 40) == go(other, other_opt, resumed, at, 40)
    assert str(resumed.life) == str(engine.life)
    assert len({d.what for d in engine.life}) > 2
    engine.save_checkpoint(tmp_path / "end")
    replayed = apply_journal(mlp(), tmp_path / "end")
    for a, b in zip(replayed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)

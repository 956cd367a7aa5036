"""Policies of the user's own: functions, objects, classes; what they are given, and how they come back."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tracker
from tests.checkpoint.runs import fresh
from tests.surgery.subjects import equal, snapshot, train
from tracker import Candidate, NeuronEngine, Phases, Policy, Requests, Size
from tracker.errors import CheckpointError, SurgeryError

STEPS = {"warm_up": 2, "every": 8, "look": 2, "settle": 2}


class Mine(Policy):
    def decide(self, *args: Any, **options: Any) -> Requests:
        return Requests("mine")


@dataclass(frozen=True)
class WithField(Mine):
    share: float = 0.1


@pytest.mark.parametrize(
    "policy",
    [Mine(**STEPS), WithField(**STEPS, share=0.2), Phases([(0, Policy(**STEPS)), (9, WithField(**STEPS))])],  # type: ignore[arg-type]
    ids=["no field", "a field", "phases"],
)  # fmt: skip
def test_an_own_policy_comes_back(policy: Any, tmp_path: Path) -> None:
    model, opt, x = fresh("mlp", "Adam")
    engine = NeuronEngine()
    engine.track_model(model, "mlp", example_inputs=x)
    engine.attach_optimizer(opt)
    engine.start_self_modification(policy)
    for _ in range(4):
        engine.step(train(model, opt, x))
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh("mlp", "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert resumed.trainer.run is not None
    assert resumed.trainer.run.policy.to_dict() == policy.to_dict()
    assert type(resumed.trainer.run.policy.at(20)[1]) is type(policy.at(20)[1])
    for _ in range(16):
        engine.step(train(model, opt, x))
        resumed.step(train(other, other_opt, x))
    assert [(d.what, d.why) for d in resumed.life] == [(d.what, d.why) for d in engine.life]
    assert "mine" in [d.why for d in engine.life]


def test_a_class_that_is_not_here_is_refused() -> None:
    data = {**Mine().to_dict(), "class": "somewhere:Theirs"}
    with pytest.raises(SurgeryError, match="import or define it"):
        Policy.from_dict(data)
    with pytest.raises(SurgeryError, match="os:system"):
        Policy.from_dict({"class": "os:system"})


def mine(candidates: Any, now: Size, losses: Any, blocked: Any) -> Requests | None:
    return Requests("mine", expand={candidates[0].name: 1}) if now.parameters < 400 else None


class Counting:
    """An object with data of its own, and its settings as attributes."""

    every, look, settle, warm_up = 8, 2, 2, 2

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def decide(
        self, candidates: Any, now: Size, losses: Any, blocked: Any, *, step: int, bypasses: Any
    ) -> None:
        self.seen.append((candidates, now, list(losses), dict(blocked), step, bypasses))


def started(policy: Any) -> tuple[Any, ...]:
    model, opt, x = fresh("mlp", "Adam")
    engine = NeuronEngine()
    engine.track_model(model, "mlp", example_inputs=x)
    engine.attach_optimizer(opt)
    engine.start_self_modification(policy)
    return model, opt, x, engine


def test_a_function_decides() -> None:
    model, opt, x, engine = started(Policy.of(mine, **STEPS, grow=True))  # type: ignore[arg-type]
    for _ in range(20):
        engine.step(train(model, opt, x))
    assert [d.why for d in engine.life if d.what == "expanded"][:2] == ["mine", "mine"]


def test_an_object_is_given_what_a_rule_needs() -> None:
    """Statistics, gradients, sizes: against what autograd and the data say."""
    own = Counting()
    model, opt, x, engine = started(own)
    squares, read = [], []
    for step in range(1, 11):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        first = model[0]
        squares.append(float(first.weight.grad.square().sum() + first.bias.grad.square().sum()))
        read.append(model[:2](x).detach())
        opt.step()
        assert engine.step(loss) is None
        assert len(own.seen) == step // 10
    (candidates, now, losses, blocked, step, bypasses) = own.seen[0]
    one = next(c for c in candidates if c.name == "0")
    assert isinstance(one, Candidate)
    assert isinstance(now, Size)
    # It looked at the last two steps.
    assert one.gradient == pytest.approx((sum(squares[-2:]) / 2) ** 0.5, rel=1e-4)
    seen = torch.cat(read[-2:]).double()
    assert torch.allclose(torch.tensor(one.means), seen.mean(0).float(), atol=1e-5)
    variance = seen.var(0, correction=0).float()
    assert torch.allclose(torch.tensor(one.variances), variance, atol=1e-5)
    assert (step, bypasses, blocked, len(losses)) == (10, (), {}, 1)
    assert now.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["function", "object", "phases"])
def test_rules_come_back_from_a_checkpoint(kind: str, tmp_path: Path) -> None:
    gc.collect()  # objects of this name that other tests made
    made: Any = {
        "function": lambda: Policy.of(mine, **STEPS, grow=True),  # type: ignore[arg-type]
        "object": Counting,
        "phases": lambda: Phases([(0, Policy(**STEPS)), (9, Policy.of(mine, **STEPS))]),  # type: ignore[arg-type]
    }[kind]()
    model, opt, x, engine = started(made)
    for _ in range(4):
        engine.step(train(model, opt, x))
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh("mlp", "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    for _ in range(16):
        engine.step(train(model, opt, x))
        resumed.step(train(other, other_opt, x))
    assert [(d.what, d.why) for d in resumed.life] == [(d.what, d.why) for d in engine.life]


def test_a_rule_that_is_not_here_is_refused(tmp_path: Path) -> None:
    def passing(*args: Any) -> None:
        return None

    _model, _, _, engine = started(Policy.of(passing, **STEPS))  # type: ignore[arg-type]
    engine.save_checkpoint(tmp_path / "run")
    engine.stop_self_modification()
    engine.start_self_modification(Policy())
    del passing
    for name in ("os:system", "builtins:eval", "nowhere:no"):
        with pytest.raises(SurgeryError, match="not made a policy here"):
            Policy.from_dict({"rule": name})
    gc.collect()
    other, other_opt, _ = fresh("mlp", "Adam")
    with pytest.raises(CheckpointError, match="policy="):
        NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)


class Built(Policy):
    """With a constructor and data of its own."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(**STEPS)  # type: ignore[arg-type]
        object.__setattr__(self, "words", words)

    def decide(self, *args: Any, **options: Any) -> Requests:
        return Requests(self.words[0])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Weighing(Mine):
    weights: Any = None


class Saying:
    def __init__(self, word: str) -> None:
        self.word = word

    def decide(self, *args: Any) -> Requests:
        return Requests(self.word)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Built(["own"]),
        lambda: Weighing(**STEPS, weights=torch.ones(3)),
        lambda: Weighing(**STEPS, weights=(1, 2)),
        lambda: Phases([(0, Policy.of(Saying("a"), **STEPS)), (9, Policy.of(Saying("b"), **STEPS))]),
        lambda: Phases([(0, Policy.of(lambda *a: None, **STEPS)), (9, Policy.of(lambda *a: Requests("l"), **STEPS))]),
    ],
    ids=["constructor", "tensor", "tuple", "objects", "lambdas"],
)  # fmt: skip
def test_what_no_checkpoint_holds_is_passed(make: Any, tmp_path: Path) -> None:
    policy = make()
    model, opt, x, engine = started(policy)
    for _ in range(4):
        engine.step(train(model, opt, x))
    path = engine.save_checkpoint(tmp_path / "run")
    engine.carry_journal(run=True)
    state = copy.deepcopy([model.state_dict(), opt.state_dict()])
    other, other_opt, _ = fresh("mlp", "Adam")
    before = snapshot(other, other_opt)
    with pytest.raises(CheckpointError, match="policy="):
        NeuronEngine.load_checkpoint(path, other, other_opt)
    assert equal(snapshot(other, other_opt), before)
    resumed = NeuronEngine.load_checkpoint(path, other, other_opt, policy=make())
    third, third_opt, _ = fresh("mlp", "Adam")
    carried = NeuronEngine()
    carried.track_model(third, "mlp", example_inputs=x)
    carried.carry_journal(run=True)
    third.load_state_dict(state[0])
    third_opt.load_state_dict(state[1])
    carried.attach_optimizer(third_opt)
    with pytest.raises(SurgeryError, match="policy="):
        carried.start_self_modification()
    carried.start_self_modification(make())
    for _ in range(16):
        engine.step(train(model, opt, x))
        resumed.step(train(other, other_opt, x))
        carried.step(train(third, third_opt, x))
    told = [[(d.what, d.why) for d in e.life] for e in (engine, resumed, carried)]
    assert told[0] == told[1] == told[2]
    assert len(told[0]) > 2


def test_a_policy_needs_a_run_to_go_on_with(tmp_path: Path) -> None:
    model, _, x = fresh("mlp", "Adam")
    engine = NeuronEngine()
    engine.track_model(model, "mlp", example_inputs=x)
    path = engine.save_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="start_self_modification"):
        NeuronEngine.load_checkpoint(path, fresh("mlp", "Adam")[0], policy=Policy())


def test_what_cannot_decide_is_refused() -> None:
    for policy in (3, "shrink", object(), Counting):
        with pytest.raises(SurgeryError, match="function"):
            started(policy)
    with pytest.raises(SurgeryError, match="has no 'evry'"):
        Policy.of(mine, evry=3)
    model, _, _, engine = started(Policy.of(lambda *args: "grow", **STEPS))  # type: ignore[arg-type]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(9):
        model(torch.randn(4, 6))
        engine.step(0.0)
    with pytest.raises(SurgeryError, match=r"decides on tracker\.Requests"):
        engine.step(0.0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("what", ["remove", "expand", "merge", "recycle"])
def test_groups_that_are_not_there_are_noted(what: str) -> None:
    value: Any = {"expand": 3, "merge": ((0, 1),)}.get(what, (0,))
    rule: Any = lambda *args: Requests("?", **{what: {"nope": value}})  # noqa: E731
    model, opt, x, engine = started(Policy.of(rule, **STEPS))  # type: ignore[arg-type]
    for _ in range(10):
        engine.step(train(model, opt, x))
    assert [d.what for d in engine.life] == ["kept", "refused"]
    assert "'nope'" in engine.life[-1].why


def test_types_are_public() -> None:
    assert {"Bypass", "Candidate", "Requests", "Size"} <= set(tracker.__all__)

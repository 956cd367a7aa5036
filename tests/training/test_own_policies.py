"""A policy of the user's own class goes into a checkpoint by its name, and comes back as what it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.journal.runs import fresh
from tests.surgery.subjects import train
from tracker import NeuronEngine, Phases, Policy
from tracker.errors import SurgeryError
from tracker.training.policy import Requests

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
    assert resumed._own_run is not None
    assert resumed._own_run.policy.to_dict() == policy.to_dict()
    assert type(resumed._own_run.policy.at(20)[1]) is type(policy.at(20)[1])
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

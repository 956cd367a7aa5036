"""`compress` by other criteria: the order that each one gives, the same budget, and what makes no sense refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, SurgeryError
from tracker.compensation import CRITERIA, Evidence

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def prepared() -> tuple[nn.Sequential, NeuronEngine]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    engine = NeuronEngine()
    engine.track_model(model, "mlp", X[:8])
    engine.calibrate([X])
    return model, engine


def gone(engine: NeuronEngine, **how: Any) -> set[int]:
    receipt = engine.compress(0.6, of="neurons", progress=False, dry_run=True, **how)
    assert abs(sum(map(len, receipt.units.values())) - 0.4 * 36) <= 1
    return set(receipt.units.get("0", []))


def lowest(values: Tensor, count: int) -> set[int]:
    return set(values.argsort()[:count].tolist())


def test_each_criterion_removes_what_scores_lowest() -> None:
    model, engine = prepared()
    model(X).square().sum().backward()
    first = model[0]
    with torch.no_grad():
        h = torch.relu(first(X)).double()
        read = model[2].weight.double().square().sum(0)
        rows = torch.cat((first.weight, first.bias[:, None]), 1).double()
        gradients = torch.cat((first.weight.grad, first.bias.grad[:, None]), 1).double()
        expected = {
            "magnitude": rows.norm(dim=1),
            "activity": h.square().mean(0).sqrt(),
            "fluctuation": h.var(0, unbiased=False) * read,
            "taylor": (rows * gradients).sum(1).abs(),
        }
    for name, values in expected.items():
        found = gone(engine, criterion=name)
        assert found == lowest(values, len(found)), name
    assert gone(engine, criterion="random") == gone(engine, criterion="random")
    ours = gone(engine)
    assert gone(engine, criterion="reconstruction") == ours
    assert {"magnitude", "activity", "fluctuation", "taylor", "random"} <= set(CRITERIA)


def test_a_function_will_do() -> None:
    _, engine = prepared()

    def last_first(evidence: Evidence) -> Tensor:
        return -torch.arange(len(evidence.units))

    found = gone(engine, criterion=last_first)
    assert found == set(range(20 - len(found), 20))


def test_without_compensation_consumers_see_zero() -> None:
    model, engine = prepared()
    weight = model[2].weight.detach().clone()
    receipt = engine.compress(
        0.6, of="neurons", criterion="magnitude", compensate=False, progress=False
    )
    assert receipt.promise == "masked"
    left = [i for i in range(20) if i not in receipt.units["0"]]
    kept = [i for i in range(16) if i not in receipt.units["2"]]
    assert torch.equal(model[2].weight, weight[kept][:, left])


def test_what_makes_no_sense_is_refused() -> None:
    model, engine = prepared()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cases: list[tuple[Any, str]] = [
        ("size", "No criterion is called 'size'; there are 'reconstruction', 'magnitude'"),
        ("taylor", "has none: run backward"),
        (lambda evidence: torch.zeros(3), "3,.* scores for the 20 units"),
        (lambda evidence: torch.full((len(evidence.units),), torch.nan), "NaN"),
    ]
    for criterion, why in cases:
        with pytest.raises(SurgeryError, match=why):
            engine.compress(0.6, of="neurons", criterion=criterion, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

"""Selection and compensation against brute force and least squares on the data themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tracker.compensation import (
    CRITERIA,
    ErrorCurve,
    Evidence,
    allocate,
    backward,
    column_growth,
    compensate,
    explained_share,
    forward,
    path,
    residual,
    scores,
    select,
)
from tracker.errors import SurgeryError


def data(n: int, seed: int = 0, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Correlated, skewed samples (rows, n) and weights (5, n), float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g, dtype=torch.float64)
    x = (x @ torch.randn(n, n, generator=g, dtype=torch.float64)).relu() + 0.1 * x
    return x, torch.randn(5, n, generator=g, dtype=torch.float64)


def cov(x: Tensor) -> Tensor:
    return torch.cov(x.T, correction=0)


def oracle(x: Tensor, w: Tensor, kept: list[int], intercept: bool = True) -> float:
    """Mean squared error of the best outputs from the kept columns, by lstsq on the data."""
    z = (x @ w.T).numpy()
    a = x[:, kept].numpy()
    if intercept:
        a = np.concatenate([a, np.ones((len(a), 1))], 1)
    fit = np.linalg.lstsq(a, z, rcond=None)[0]
    return float(((z - a @ fit) ** 2).sum() / len(a))


def without(n: int, gone: set[int]) -> list[int]:
    return [j for j in range(n) if j not in gone]


@given(n=st.integers(2, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_first_steps_are_the_best_and_errors_are_those_of_least_squares(n: int, seed: int) -> None:
    x, w = data(n, seed)
    units = [[j] for j in range(n)]
    found = backward(cov(x), w, units, ridge=0.0)
    best = min(range(n), key=lambda j: oracle(x, w, without(n, {j})))
    assert found.order[0] == best
    for t, error in enumerate(found.errors.tolist()):
        want = oracle(x, w, without(n, set(found.order[: t + 1])))
        assert error == pytest.approx(want, rel=1e-6, abs=1e-9 * found.total)
    ahead = forward(cov(x), w, units, 1, ridge=0.0)
    kept = min(range(n), key=lambda j: oracle(x, w, [j]))
    assert set(range(n)) - set(ahead.order) == {kept}


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("width", [1, 3])
def test_blocks_change_nothing(width: int, ridge: float) -> None:
    x, w = data(120)
    units = [list(range(j, j + width)) for j in range(0, 120, width)]
    a = backward(cov(x), w, units, [2, 5], ridge=ridge, block=1)
    b = backward(cov(x), w, units, [2, 5], ridge=ridge, block=16)
    assert a.order == b.order
    assert not {2, 5} & set(a.order)
    torch.testing.assert_close(a.errors, b.errors, rtol=1e-7, atol=1e-9 * a.total)
    along = path(cov(x), w, units, a.order, ridge=ridge)
    torch.testing.assert_close(a.errors, along.errors, rtol=1e-6, atol=1e-9 * a.total)
    kept = [j for u in range(len(units)) if u not in a.order[:9] for j in units[u]]
    if not ridge:
        assert a.errors[8] == pytest.approx(oracle(x, w, kept), rel=1e-6)
        assert residual(cov(x), w, kept) == pytest.approx(oracle(x, w, kept), rel=1e-6)


@pytest.mark.parametrize("ridge", [0.0, None])
def test_what_depends_goes_first_and_is_made_up_for_exactly(ridge: float | None) -> None:
    x, w = data(8)
    one = torch.ones(len(x), 1, dtype=torch.float64)
    x = torch.cat([0 * one, x, 3 * one, x[:, 2:3], x[:, 1:2] - 2 * x[:, 4:5] + 1], 1)
    w = torch.cat([w, w[:, :4]], 1)
    mean, bias = x.mean(0), torch.arange(5.0, dtype=torch.float64)
    found = backward(cov(x), w, [[j] for j in range(12)], count=400, mean=mean, ridge=ridge)
    assert found.exact == 4
    assert set(found.order[:4]) == {0, 9, 10, 11}
    assert found.errors[3] <= 1e-12 * found.total
    if (
        ridge == 0
    ):  # the kept ones hold what the dependent ones gave: later errors are right as well
        for t, error in enumerate(found.errors.tolist()):
            left = oracle(x, w, without(12, set(found.order[: t + 1])))
            assert error == pytest.approx(left, rel=1e-6, abs=1e-9 * found.total)
    kept = without(12, set(found.order[:4]))
    s = compensate(cov(x), mean, w, bias, kept, count=400, ridge=ridge)
    assert s.exact
    want = x @ w.T + bias
    assert s.bias is not None
    got = x[:, kept] @ s.weight.T + s.bias
    assert (got - want).norm() <= 1e-9 * want.norm()
    share = explained_share(cov(x), mean)
    assert share[[0, 9]].isnan().all()
    assert (share[[3, 10, 2, 5, 11]] == 1).all()
    assert (share[[1, 4, 6, 7, 8]] < 1).all()


def test_few_observations_prove_no_dependence() -> None:
    x, w = data(40, rows=20)
    assert backward(cov(x), w, [[j] for j in range(40)], count=20).exact == 0


@pytest.mark.parametrize("with_bias", [True, False])
def test_compensation_is_least_squares(with_bias: bool) -> None:
    x, w = data(10)
    kept = [0, 2, 3, 7, 9]
    bias = torch.ones(5, dtype=torch.float64) if with_bias else None
    s = compensate(cov(x), x.mean(0), w, bias, kept, count=400, ridge=0.0)
    got = x[:, kept] @ s.weight.T + (0 if s.bias is None else s.bias)
    want = x @ w.T + (0 if bias is None else bias)
    error = float((got - want).square().sum() / len(x))
    assert error == pytest.approx(oracle(x, w, kept, with_bias), rel=1e-8)
    assert s.error == pytest.approx(error, rel=1e-8)
    assert not s.exact


def test_select_takes_the_better_when_few_are_kept() -> None:
    x, w = data(40)
    units = [[j] for j in range(40)]
    s = select(cov(x), w, units, 36, count=400)
    assert len(s.order) == 36
    back = backward(cov(x), w, units, (), 36, count=400)
    assert s.errors[-1] <= back.errors[-1]
    with pytest.raises(SurgeryError, match="at least 1"):
        backward(cov(x), w, units, (), 40)


def test_criteria_give_one_score_per_unit() -> None:
    v = torch.arange(1.0, 7.0)
    e = Evidence([[0, 1], [2, 3], [4, 5]], torch.ones(2, 6), v, v, v, v)
    for name in CRITERIA:
        assert scores(name, e).shape == (3,)
    assert scores("activity", e).tolist() == [3, 7, 11]


def test_moments() -> None:
    before, after = torch.tensor([[1.0, 0, 2]]), torch.tensor([[3.0, 1, 0]])
    assert column_growth(before, after).tolist() == [3, 1, 1]


@given(share=st.floats(0.1, 0.95), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_allocation_meets_the_budget(share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = [100, 256, 400]
    paths = [
        ErrorCurve(n, torch.rand(n - 1, generator=g).square().cumsum(0).tolist()) for n in sizes
    ]

    def cost(removed: list[int]) -> float:
        a, b, c = (n - r for n, r in zip(sizes, removed, strict=True))
        return 50 * a + a * b + b * c + c * 10

    budget = share * cost([0, 0, 0])
    kept = allocate(paths, cost, budget)
    left = cost([n - k for n, k in zip(sizes, kept, strict=True)])
    assert left == pytest.approx(budget, rel=0.02)


def test_allocation_prefers_what_is_free_and_says_why_not() -> None:
    free, dear = ErrorCurve(10, [0.0] * 9), ErrorCurve(10, [1.0 + i for i in range(9)])
    assert allocate([free, dear], lambda r: 20 - sum(r), 12) == [2, 10]
    assert allocate([ErrorCurve(64, [0.1 * i for i in range(63)], 8)], lambda r: 64 - r[0], 32) == [
        32
    ]
    with pytest.raises(SurgeryError, match="floor"):
        allocate([free, dear], lambda r: 20 - sum(r), 1)

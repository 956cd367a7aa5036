"""Streaming statistics agree with two passes in float64 over the stored values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.statistics import oracle
from tracker.statistics import (
    Activity,
    ActivityStream,
    Covariance,
    CovarianceStream,
    Scratch,
    observe,
)
from tracker.statistics.native import kernel

STREAMS = oracle.streams()


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both paths."""
    if request.param == "torch":
        monkeypatch.setattr("tracker.statistics.stream.kernel", lambda: None)
        monkeypatch.setattr("tracker.statistics.covariance.kernel", lambda: None)
    elif kernel() is None:
        pytest.skip("no compiled code here")


def stream_activity(batches: list[torch.Tensor], axis: int = -1) -> Activity:
    """As the hooks do it."""
    stream, scratch = ActivityStream(batches[0].shape[axis], 0.01), Scratch()
    for batch in batches:
        stream.add(batch, axis, scratch)
    return stream.value()


@pytest.mark.parametrize("name", STREAMS)
def test_activity_agrees_with_two_passes(name: str) -> None:
    """Moments to 1e-6 relative, everything that is counted or compared exactly."""
    batches = STREAMS[name]
    expected = oracle.activity(torch.cat(batches))
    actual = stream_activity(batches).value()

    deviation = np.sqrt(expected["variance"])
    np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-6)
    assert (np.abs(actual.mean.numpy() - expected["mean"]) <= 1e-6 * deviation).all()
    for exact in ("observations", "minimum", "maximum", "nonfinite"):
        np.testing.assert_array_equal(getattr(actual, exact), expected[exact])
    for share in ("firing_frequency", "zero_fraction"):
        np.testing.assert_allclose(getattr(actual, share), expected[share], rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in STREAMS if n not in ("tiny", "huge", "float64")])
def test_correlation_agrees_with_two_passes(name: str) -> None:
    """Every pair to 1e-6."""
    batches = STREAMS[name]
    stream = CovarianceStream(batches[0].shape[1])
    for batch in batches:
        known = batch.double().mean(0) if len(batch) else None
        stream.add(batch, known)

    actual = stream.value().correlation()

    np.testing.assert_allclose(actual, oracle.correlation(torch.cat(batches)), atol=1e-6)


@pytest.mark.parametrize("neurons", [8, 128, 129, 513, 1100])
def test_nearly_dependent_neurons(neurons: int) -> None:
    """Six inputs behind a ReLU: correlations near 1, sums of one sign; narrow and wide layers take different ways."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(6000, 6, generator=g) @ torch.randn(6, neurons, generator=g)).relu()
    stream = CovarianceStream(neurons)
    for batch in x.split(700):
        stream.add(batch, batch.double().mean(0))
    np.testing.assert_allclose(stream.value().correlation(), oracle.correlation(x), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((64, 512), 1),
        ((1, 7), 1),
        ((7,), 0),
        ((4, 9, 33), -1),
        ((9, 5, 6), 1),
        ((8, 16, 5, 5), 1),
        ((2, 16, 40, 40), 1),
        ((2, 3, 4, 5, 6), 1),
        ((1, 2, 70_000), 1),
        ((3000, 50), 1),
        ((16, 30), 0),
    ],
)
@pytest.mark.parametrize(
    "layout", ["contiguous", "reversed", "channels_last", "strided", "expanded"]
)
def test_any_shape_and_memory_layout(shape: tuple[int, ...], axis: int, layout: str) -> None:
    """Only the values count, not how they lie in memory."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).relu()
    if layout == "reversed":
        x = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    elif layout == "channels_last" and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack((x, x + 1), -1)[..., 0]
    elif layout == "expanded":
        x = x.unsqueeze(0).expand(3, *shape)
        axis = axis + 1 if axis >= 0 else axis
    expected = oracle.activity(x, axis)
    actual = observe(x, axis, 0.01, Scratch()).value()
    np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(actual.mean, expected["mean"], rtol=1e-6)
    np.testing.assert_array_equal(actual.maximum, expected["maximum"])
    np.testing.assert_allclose(actual.firing_frequency, expected["firing_frequency"], rtol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_counted_apart(bad: float) -> None:
    """They poison neither their own neuron's moments nor any other's."""
    batches = [b.clone() for b in STREAMS["mean 1e4, std 1e-2"]]
    batches[3][5, 7] = bad
    batches[9][:, 2] = bad
    expected = oracle.activity(torch.cat(batches))

    actual = stream_activity(batches).value()

    np.testing.assert_array_equal(actual.nonfinite, expected["nonfinite"])
    np.testing.assert_array_equal(actual.observations, expected["observations"])
    np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-6)


def test_a_neuron_of_only_nan_has_no_statistics() -> None:
    """NaN where a number would be a lie, and the neighbours are whole."""
    x = torch.randn(10, 3)
    x[:, 1] = torch.nan
    value = stream_activity([x]).value()
    assert value.observations.tolist() == [10, 0, 10]
    assert value.mean.isnan().tolist() == [False, True, False]
    assert value.firing_frequency.isnan().tolist() == [False, True, False]


def test_a_broken_sample_is_left_out_of_the_covariance() -> None:
    """Correlation of the other rows, to rounding."""
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(3))
    bad = x.clone()
    bad[17] = torch.inf
    bad[300, :5] = torch.nan
    keep = torch.ones(600, dtype=torch.bool)
    keep[[17, 300]] = False
    value = Covariance.of(bad)
    assert value.count.tolist() == [598] * 8
    np.testing.assert_allclose(value.correlation(), oracle.correlation(x[keep]), atol=1e-6)


def test_a_broken_neuron_costs_only_its_own_correlations() -> None:
    """The others keep theirs; its own are not comparable once it has missed a batch."""
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(3))
    bad = x.clone()
    bad[17, 3] = torch.inf
    stream = CovarianceStream(8)
    for batch in bad.split(100):
        stream.add(batch)
    value = stream.value()
    assert value.count.tolist() == [600, 600, 600, 500, 600, 600, 600, 600]
    others = [0, 1, 2, 4, 5, 6, 7]
    r = value.correlation()
    assert r[3, others].isnan().all()
    expected = oracle.correlation(x[:, others])
    np.testing.assert_allclose(r[others][:, others], expected, atol=1e-6)


def test_the_path_without_synchronisation_agrees() -> None:
    """What runs on accelerators, run here on the CPU: the same numbers."""
    from tracker.statistics.reduce import masked, split_at

    for name in (
        "standard normal",
        "mean 1e4, std 1e-2",
        "relu",
        "bfloat16",
        "jump within a batch",
    ):
        x = torch.cat(STREAMS[name])
        expected, actual = oracle.activity(x), masked(split_at(x, -1), 0.01).value()
        np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-5)
        np.testing.assert_array_equal(actual.minimum, expected["minimum"])
        np.testing.assert_allclose(actual.zero_fraction, expected["zero_fraction"], rtol=1e-12)


def test_constant_neurons_have_no_variance_and_no_correlation() -> None:
    """Whatever the constant, and however many batches."""
    batches = [torch.full((n, 3), 0.1) for n in (7, 64, 1000)]
    for b in batches:
        b[:, 1] = torch.randn(len(b))
        b[:, 2] = 1e7
    value = stream_activity(batches).value()
    assert value.variance[0] == 0
    assert value.variance[2] == 0
    stream = CovarianceStream(3)
    for b in batches:
        stream.add(b, b.double().mean(0))
    r = stream.value().correlation()
    assert r.isnan().tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert stream.value().pairs_above(0.0) == []


def test_matrix_products_ignore_the_users_precision() -> None:
    """bf16 products allowed for the model are not for its statistics, and the setting is given back."""
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(4)) + 10
    torch.set_float32_matmul_precision("medium")
    try:
        r = Covariance.of(x).correlation()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_allclose(r, oracle.correlation(x), atol=1e-6)


def held(value: object) -> list[torch.Tensor]:
    """All tensors that an object holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [t for part in value for t in held(part)]
    names = getattr(value, "__slots__", None) or getattr(value, "__dict__", ())
    return [t for name in names for t in held(getattr(value, name))]


@pytest.mark.slow
def test_a_million_samples_in_constant_memory() -> None:
    """Accuracy does not wear off, and nothing grows."""
    from tracker import NeuronEngine

    g = torch.Generator().manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(8, 8)).eval()
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking(enable_correlation_analysis=True)
    point = engine.tracker.current.observer.points[0]
    sizes, mean, m2, n = set(), np.zeros(8), np.zeros(8), 0
    with torch.no_grad():
        for _ in range(1000):
            x = torch.randn(1000, 8, generator=g) + 100
            y = model(x).double().numpy()
            delta = y.mean(0) - mean
            m2 += ((y - y.mean(0)) ** 2).sum(0) + delta**2 * n * 1000 / (n + 1000)
            mean, n = mean + delta * 1000 / (n + 1000), n + 1000
            window = point.windows[False]
            sizes.add(sum(t.numel() for t in held(window)))
    # The table, the batches that wait to be merged, the co-moments, and the staged rows.
    assert max(sizes) <= 8 * (9 + 16 * 7) + 2 * 8 * 8 + 2 * 8 + 512 * 32
    assert len(sizes) <= 20
    stats = engine.get_dataset_statistics()
    for slot in range(8):
        assert stats[slot]["observations"] == 1_000_000
        assert stats[slot]["variance"] == pytest.approx(m2[slot] / n, rel=1e-6)
        deviation = stats[slot]["std_deviation"]
        assert stats[slot]["mean"] == pytest.approx(mean[slot], abs=1e-7 * deviation)

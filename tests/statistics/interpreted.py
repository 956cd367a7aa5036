"""Triton's code for GPUs, run on the CPU by Triton's interpreter: the same statistics on every stream.

Run by test_fused.py in a process of its own, since Triton reads TRITON_INTERPRET once, when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.statistics import oracle
from tracker.statistics import Activity, ActivityStream, Scratch, stream
from tracker.statistics.activity import M2, MEAN
from tracker.statistics.native import fused, loading

STREAMS = {name: batches for name, batches in oracle.streams().items() if name != "float64"}
LAYOUTS = {
    "rows": ((70, 33), 1, torch.contiguous_format),
    "one neuron": ((70, 1), 1, torch.contiguous_format),
    "many neurons": ((5, 300), 1, torch.contiguous_format),
    "tokens": ((4, 9, 20), 2, torch.contiguous_format),
    "neurons in the middle": ((4, 20, 9), 1, torch.contiguous_format),
    "maps": ((3, 5, 8, 8), 1, torch.contiguous_format),
    "channels last": ((3, 5, 8, 8), 1, torch.channels_last),
    "large maps": ((2, 3, 70, 70), 1, torch.contiguous_format),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output goes the way of one on a GPU."""
    monkeypatch.setattr(stream, "kernel", lambda: None)
    monkeypatch.setattr(stream, "on_gpu", lambda x, table: fused.add)


def streamed(batches: list[Tensor], axis: int) -> Activity:
    layer = ActivityStream(batches[0].shape[axis], 0.01)
    for batch in batches:
        layer.add(batch, axis, Scratch())
    return layer.value()


def check(batches: list[Tensor], axis: int) -> None:
    got = streamed(batches, axis).value()
    expected = oracle.activity(torch.cat(batches), axis)
    for key in ("observations", "minimum", "maximum", "nonfinite"):
        np.testing.assert_array_equal(getattr(got, key), expected[key], key)
    for key in ("firing_frequency", "zero_fraction"):
        np.testing.assert_allclose(getattr(got, key), expected[key], rtol=1e-12, err_msg=key)
    np.testing.assert_allclose(got.variance, expected["variance"], rtol=1e-6)
    spread = np.sqrt(expected["variance"]) + 1e-7 * np.abs(expected["mean"])
    assert (np.abs(got.mean.numpy() - expected["mean"]) <= 1e-6 * spread).all()


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream(name: str) -> None:
    check(STREAMS[name], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape, axis, form = LAYOUTS[name]
    batches = [torch.randn(shape).to(dtype).contiguous(memory_format=form) for _ in range(2)]
    check(batches, axis)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    torch.manual_seed(0)
    x = torch.randn(90, 12)
    x[3, 4], x[5, 4], x[6, 7], x[:, 9] = torch.nan, torch.inf, -torch.inf, torch.nan
    table = streamed([x, x.relu()], 1).table
    expected = Activity.empty(12)
    for batch in (x, x.relu()):
        expected = expected.merge(stream.masked(batch[:, :, None].double(), 0.01))
    exact = [row for row in range(9) if row not in (MEAN, M2)]
    assert torch.equal(table[exact], expected.table[exact])
    torch.testing.assert_close(
        table[MEAN : M2 + 1], expected.table[MEAN : M2 + 1], rtol=1e-6, atol=1e-7
    )


def test_several_programs_for_each_neuron_and_the_trial_at_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "TILE", 256)
    monkeypatch.setattr(fused, "PROGRAMS", 6)
    torch.manual_seed(0)
    check([torch.randn(333, 70) + 5, torch.randn(1, 70)], 1)
    check([torch.randn(7, 3, 11, 11) + 5], 1)
    assert loading.load_for(torch.device("cpu")) is fused.add

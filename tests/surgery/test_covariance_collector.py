"""Streams that consumers share: each must have seen exactly what it read, whoever read the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tracker import NeuronEngine
from tracker.statistics import Covariance
from tracker.surgery.calibration.covariance_collector import CovarianceCollector

READERS = ("queries", "keys", "values")
# In each pass: who reads which of two tensors, in which order, and whether the model writes to it afterwards.
PASS = st.lists(
    st.tuples(st.sampled_from(READERS), st.integers(0, 1), st.booleans()), min_size=1, max_size=6
)


def expected(seen: list[Tensor]) -> Covariance:
    rows = torch.cat(seen).double()
    mean = rows.mean(0)
    return Covariance(torch.full((4,), len(rows)), mean, (rows - mean).T @ (rows - mean))


def equal(found: Covariance, seen: list[Tensor]) -> bool:
    want = expected(seen)
    return (
        torch.equal(found.count, want.count)
        and torch.allclose(found.mean, want.mean, atol=1e-9)
        and torch.allclose(found.comoment, want.comoment, atol=1e-6)
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(PASS, min_size=1, max_size=5), st.integers(0, 1000))
def test_each_reader_has_seen_what_it_read(passes: list[list[tuple]], seed: int) -> None:
    generator, readings = torch.Generator().manual_seed(seed), CovarianceCollector()
    seen: dict[str, list[Tensor]] = {}
    for reads in passes:
        tensors = [torch.randn(3, 4, generator=generator) for _ in range(2)]
        for reader, which, written in reads:
            tensor = tensors[which]
            readings.add(reader, tensor, tensor)
            seen.setdefault(reader, []).append(tensor.clone())
            if written:
                tensor.mul_(0.5)
        if seed % 3 == 0:  # asked for in between, and going on
            readings.values()
    found = readings.values(release=True)
    assert found.keys() == seen.keys()
    assert all(equal(found[reader], rows) for reader, rows in seen.items())
    assert readings.values() == {}


def test_who_reads_the_same_shares_one_stream() -> None:
    readings = CovarianceCollector()
    for _ in range(4):
        tensor, other = torch.randn(5, 4), torch.randn(5, 4)
        for reader in READERS:
            readings.add(reader, tensor, tensor)
        readings.add("output", other, other)
    found = readings.values()
    assert found["queries"] is found["keys"] is found["values"]
    assert found["output"] is not found["keys"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.embed, self.out = nn.Linear(4, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2) / 3
        return self.out(scores.softmax(-1) @ self.v(h))


def test_a_removal_leaves_them_shared_and_right() -> None:
    """Of what queries, keys and values read, a column goes for all of them at once."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(7, 5, 4)
    engine = NeuronEngine()
    engine.track_model(model, "attention", x)
    engine.calibrate([x[:4], x[4:]])
    engine.prune_neurons({"embed": [1, 4]})
    reads = engine.tracker.current.reads
    assert reads["q.weight"].covariance is reads["k.weight"].covariance
    rows = model.embed(x).detach().flatten(0, 1).double()
    centred = rows - rows.mean(0)
    assert torch.allclose(reads["v.weight"].covariance.comoment, centred.T @ centred, atol=1e-5)

"""A layer of the user's own class, known by one entry in the registry, is a layer in everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, StructureError, register_layer_kind
from tracker.modules import kinds

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))


class Dense(nn.Module):
    """x @ kernel + bias, as Flax has it."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, features) / inputs**0.5)
        self.shift = nn.Parameter(torch.zeros(features))
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.kernel + self.shift).view(-1, self.features)


class Sub(Dense):
    """A subclass is of the same kind."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    register_layer_kind(
        Dense, weight="kernel", makes=1, reads=0, bias="shift", sizes={"features": ("kernel", 1)}
    )


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """The same function, of layers of our own and of torch's."""
    torch.manual_seed(0)
    own = nn.Sequential(Dense(6, 16), nn.ReLU(), Sub(16, 12), nn.ReLU(), Dense(12, 3))
    plain = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        own[0].kernel[:, 3], own[0].shift[3] = 0, -1  # dead
        for a, b in zip(own[::2], plain[::2], strict=True):
            b.weight.copy_(a.kernel.T)
            b.bias.copy_(a.shift)
    return own, plain


def test_it_does_what_a_linear_layer_does(tmp_path: Path) -> None:
    """Observed alike, and every change gives the same function, the same ids and sizes."""
    engines = []
    for model in pair():
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=X)
        engine.attach_optimizer(optimizer)
        engine.start_tracking(enable_correlation_analysis=True)
        model(X)
        engine.calibrate([X])
        engines.append((model, optimizer, engine))
    (own, _, ours), (plain, _, theirs) = engines
    assert ours.get_dead_neurons() == theirs.get_dead_neurons() == {"0": [3], "2": [], "4": []}

    def alike() -> None:
        assert ours.track_model(own) == theirs.track_model(plain)
        with torch.no_grad():
            assert torch.allclose(own(X), plain(X), atol=1e-4)

    def both(change: object) -> None:
        a, b = change(ours), change(theirs)  # type: ignore[operator]
        assert (a.promise, a.removed_ids, a.added_ids) == (b.promise, b.removed_ids, b.added_ids)
        alike()

    alike()
    both(lambda e: e.prune_neurons({"0": [3, 5]}))
    both(lambda e: e.merge_neurons([(0, 1)]))
    both(lambda e: e.recycle_neurons({"2": [0]}))
    both(lambda e: e.insert_layer("0"))
    both(lambda e: e.remove_layer("0.inserted", force=True))
    both(lambda e: e.expand_layer("2", 2))
    both(lambda e: e.compress(0.7, progress=False))
    both(lambda e: e.undo())
    assert (own[2].features, own[2].kernel.shape) == (14, (13, 14))
    for model, optimizer, _ in engines:
        model(X).square().mean().backward()
        optimizer.step()
    ours.save_checkpoint(tmp_path / "c")
    fresh = pair()[0]
    NeuronEngine.load_checkpoint(tmp_path / "c", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(X), own(X))


def test_it_can_go_whole() -> None:
    own, plain = pair()
    for model in (own, plain):
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=X)
        receipt = engine.remove_layer("2", force=True)
        assert receipt.parameters_after < receipt.parameters_before
    with torch.no_grad():
        assert torch.allclose(own(X), plain(X), atol=1e-4)


def test_what_cannot_be_a_kind_is_refused() -> None:
    with pytest.raises(StructureError, match="class of modules"):
        register_layer_kind(Dense(2, 3), weight="kernel", makes=1, reads=0)  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="dimensions 0 and 1"):
        register_layer_kind(Dense, weight="kernel", makes=1, reads=1)


def test_layers_that_do_not_grow_say_so() -> None:
    register_layer_kind(Sub, weight="kernel", makes=1, reads=0, bias="shift", grows=False)
    own, _ = pair()
    engine = NeuronEngine()
    engine.track_model(own, "m", example_inputs=X)
    with pytest.raises(Exception, match="do not grow"):
        engine.expand_layer("2", 1)

"""Layers whose weight is computed before it is used, through every change, in train mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.bits import equal, everything
from tests.zoo_computed import COMPUTED
from tracker import NeuronEngine, TrackerError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
CHANGES: dict[str, Callable[..., Any]] = {
    "prune_units": lambda e, **k: e.prune_units({"0": [0, 3]}, **k),
    "prune_neurons": lambda e, **k: e.prune_neurons({"2": [0, 1]}, **k),
    "compensated": lambda e, **k: e.prune_units({"0": [1], "2": [4]}, compensate=True, **k),
    "merge_neurons": lambda e, **k: e.merge_neurons(
        [tuple(e.tracker.current.layers["2"].ids[:2])], **k
    ),
    "expand_layer": lambda e, **k: e.expand_layer("2", 2, **k),
    "expand the first": lambda e, **k: e.expand_layer("0", 2, **k),
    "recycle_neurons": lambda e, **k: e.recycle_neurons({"2": [0]}, **k),
    "compress": lambda e, **k: e.compress(0.7, progress=False, **k),
    "insert_layer": lambda e, **k: e.insert_layer("2", **k),
    "remove_layer": lambda e, **k: e.remove_layer("2", force=True, **k),
}


def build(how: str) -> nn.Sequential:
    """All but the last layer are computed so."""
    torch.manual_seed(0)
    make = COMPUTED[how]
    return nn.Sequential(
        make(nn.Linear(6, 12)), nn.ReLU(), make(nn.Linear(12, 12)), nn.ReLU(), make(nn.Linear(12, 7)),
        nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


def begun(how: str) -> tuple[nn.Sequential, torch.optim.Optimizer, NeuronEngine]:
    model = build(how)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=X)
    engine.attach_optimizer(optimizer)
    engine.start_tracking(enable_correlation_analysis=True)
    train(model, optimizer)
    return model, optimizer, engine


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def versions(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(t), t._version) for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("how", COMPUTED)
def test_changes_of_computed_weights_are_whole_or_refused(how: str, tmp_path: Path) -> None:
    """Dry runs touch nothing, undo gives back the bits, training and a checkpoint go on; from a change to the next."""
    model, optimizer, engine = begun(how)
    done = []
    for name, change in CHANGES.items():
        before, counted = everything(model, optimizer, engine), versions(model)
        loss = model(X).square().mean() if how not in ("spectral norm", "first spectral norm") else None  # fmt: skip
        try:
            told = change(engine, dry_run=True)
        except TrackerError:
            told = None
        assert equal(everything(model, optimizer, engine), before), name
        assert versions(model) == counted, name
        if loss is not None:
            loss.backward()
            optimizer.zero_grad()
        before = everything(model, optimizer, engine)
        try:
            receipt = change(engine)
        except TrackerError:
            assert told is None, name
            assert equal(everything(model, optimizer, engine), before), name
            continue
        assert told is not None
        assert told.parameters_after == receipt.parameters_after
        assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
        engine.undo()
        assert equal(everything(model, optimizer, engine), before), name
        if receipt.promise in ("exact", "masked"):
            assert receipt.output_difference < 1e-9
        done.append(name)
        if name not in ("compress", "compensated"):
            change(engine)
        for _ in range(2):
            train(model, optimizer)
        assert model.eval()(X).isfinite().all()
        model.train()
    assert {"prune_units", "prune_neurons"} <= set(done)
    engine.save_checkpoint(tmp_path / "c")
    fresh = build(how)
    NeuronEngine.load_checkpoint(tmp_path / "c", fresh)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(X), model.eval()(X))
    fresh.train()(X).sum().backward()


def test_consumers_with_computed_weights_see_zero() -> None:
    model, _, engine = begun("squashed")
    outputs: list[Tensor] = []
    with torch.no_grad():
        model.eval()
        zero = model[2].register_forward_pre_hook(
            lambda _, args: args[0].index_fill(1, torch.tensor([0, 3]), 0)
        )
        outputs.append(model(X))
        zero.remove()
        engine.prune_units({"0": [0, 3]})
        outputs.append(model(X))
    assert torch.allclose(*outputs, atol=1e-6)

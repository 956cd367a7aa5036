"""Resume equals uninterrupted training, bit for bit; whatever happens to a save, the old or the new one loads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.journal.runs import CHANGES, LONG, ROOT, begun, fresh
from tests.surgery.subjects import OPTIMIZERS, equal, snapshot, train
from tracker import CheckpointError, NeuronEngine, TrackerError, apply_journal
from tracker.journal import checkpoint


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_resumed_equals_uninterrupted(name: str, optimizer: str, tmp_path: Path) -> None:
    model, opt, engine, x = begun(name, optimizer)
    for change in CHANGES.values():
        change(engine)
        train(model, opt, x)
    engine.save_checkpoint(tmp_path / "run")
    noise = [random.random(), np.random.rand(), float(torch.rand(()))]
    other, other_opt, _ = fresh(name, optimizer)
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == noise
    assert resumed.activation_threshold == 0.02
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert str(model) == str(other)
    assert engine.track_model(model) == resumed.track_model(other)
    assert engine.get_dataset_statistics() == resumed.get_dataset_statistics()
    assert engine.history.to_dict() == resumed.history.to_dict()
    assert str(engine.journal) == str(resumed.journal)
    assert len(resumed.journal) == len(CHANGES)
    for step in range(3):
        assert train(model, opt, x) == train(other, other_opt, x)
        if step == 1:
            for each in (engine, resumed):
                each.expand_layer("0", 3)
                each.prune_neurons({"0": [1]}, compensate=False)
    mine, theirs = snapshot(model, opt), snapshot(other, other_opt)
    assert equal(mine[:2], theirs[:2])
    assert engine.track_model(model) == resumed.track_model(other)


def test_removed_layers_and_heads_come_back_removed(tmp_path: Path) -> None:
    model, opt, engine, x = begun("residual")
    engine.remove_layer("blocks.1", batches=[x], force=True)
    train(model, opt, x)
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh("residual", "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert train(model, opt, x) == train(other, other_opt, x)
    assert resumed.track_model(other) == engine.track_model(model)

    torch.manual_seed(0)
    build: Callable[[], nn.Module] = lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)  # noqa: E731
    encoder, y = build().eval(), torch.randn(2, 5, 16)
    engine = NeuronEngine()
    engine.track_model(encoder, "encoder", example_inputs=y)
    heads = next(g for g in engine.structure.groups if g.kind == "head" and g.prunable)
    engine.prune_units({heads.name: [1]})
    engine.save_checkpoint(tmp_path / "encoder")
    again = apply_journal(build().eval(), tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(again(y), encoder(y))


def test_the_journal_tells_what_was_done_and_forgets_what_was_undone() -> None:
    _model, _, engine, _ = begun("mlp")
    assert str(engine.journal) == "Nothing was changed so far."
    engine.prune_neurons({"0": [0]})
    engine.expand_layer("0", 2)
    assert [e.operation for e in engine.journal] == ["prune_units", "expand_layer"]
    assert "1 neuron gone" in str(engine.journal)
    engine.undo()
    assert len(engine.journal) == 1
    assert engine.journal[0].removed_ids == (0,)
    with pytest.raises(TrackerError):
        engine.prune_neurons({"0": list(range(11))})
    assert len(engine.journal) == 1
    json.dumps(engine.journal.to_dict())


def test_apply_journal_gives_the_model_alone(tmp_path: Path) -> None:
    model, _, engine, _x = begun("conv")
    engine.prune_neurons({"0": [0, 2]})
    engine.save_checkpoint(tmp_path / "run")
    other, *_ = fresh("conv", "Adam")
    assert apply_journal(other, tmp_path / "run") is other
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


def test_what_is_no_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    _model, _, engine, _ = begun("mlp")
    with pytest.raises(CheckpointError, match="not overwritten"):
        engine.save_checkpoint(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (os, "fsync"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (checkpoint, "save_file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_leaves_the_old_or_the_new(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th call, for n = 1, 2, ... until all goes well."""
    _model, _, engine, _ = begun("mlp")
    engine.save_checkpoint(tmp_path / "run")
    engine.prune_neurons({"0": [0]})
    real, faults, failed = getattr(owner, name), 0, True
    while failed:
        calls = iter([True] * faults)

        def full(*args: Any, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls, False):
                return real(*args, **kwargs)
            monkeypatch.setattr(owner, name, real)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(owner, name, full)
        try:
            engine.save_checkpoint(tmp_path / "run")
            failed = False
        except CheckpointError:
            faults += 1
        monkeypatch.setattr(owner, name, real)
        other, opt, _ = fresh("mlp", "Adam")
        assert len(NeuronEngine.load_checkpoint(tmp_path / "run", other, opt).journal) in (0, 1)
        assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []
    assert faults


KILLED = """
import sys, torch
from tests.journal.runs import begun
model, opt, engine, x = begun("mlp")
print("ready", flush=True)
while True:
    engine.save_checkpoint(sys.argv[1])
"""


@pytest.mark.parametrize(
    "times",
    [8, pytest.param(200, marks=pytest.mark.skipif(not LONG, reason="TRACKER_LONG=1 runs it"))],
)
def test_a_kill_leaves_the_old_or_the_new(times: int, tmp_path: Path) -> None:
    path, draw = tmp_path / "run", random.Random(0)
    kept = begun("mlp")
    kept[2].save_checkpoint(path)
    for _ in range(times):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        model, opt, _ = fresh("mlp", "Adam")
        NeuronEngine.load_checkpoint(path, model, opt)

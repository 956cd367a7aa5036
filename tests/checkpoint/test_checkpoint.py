"""Resume equals uninterrupted training, bit for bit; whatever happens to a save, the old or the new one loads."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import kills
from tests.checkpoint.runs import CHANGES, ROOT, begun, fresh
from tests.surgery.subjects import OPTIMIZERS, equal, snapshot, train
from tracker import CheckpointError, NeuronEngine, TrackerError, apply_journal
from tracker.checkpoint import checkpoint_files, directories
from tracker.checkpoint.checkpoint_files import read_checkpoint, write_checkpoint
from tracker.utils.files import unique


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


FOREIGN_MANIFESTS = [
    '{"name": "my web app", "icons": []}',
    "",
    "[]",
    "[" * 10**5,
    '{"format": "tracker-checkpoint"}',
    '{"format": "tracker-checkpoint", "version": 1, "files": {"thesis.tex": {}}}',
]


@pytest.mark.parametrize("manifest", [*FOREIGN_MANIFESTS, None])
def test_a_directory_is_ours_by_its_content_alone(manifest: str | None, tmp_path: Path) -> None:
    """Foreign directories with a manifest.json; and a checkpoint of ours (None) in which somebody keeps a file."""
    _model, _, engine, _ = begun("mlp")
    folder = tmp_path / "mine"
    if manifest is None:
        engine.save_checkpoint(folder)
    else:
        folder.mkdir()
        (folder / "manifest.json").write_text(manifest)
    (folder / "thesis.tex").write_text("years of work")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match="not overwritten"):
        engine.save_checkpoint(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_of_the_first_format_loads() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))

    folder = Path(__file__).parent / "fixtures"
    expected = json.loads((folder / "expected.json").read_text())
    x, model = torch.tensor(expected["inputs"]), build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine = NeuronEngine.load_checkpoint(folder / "version1", model, optimizer)
    assert torch.allclose(model(x), torch.tensor(expected["output"]), atol=1e-6)
    operations = ["prune_units", "expand_layer", "insert_layer"]
    assert [entry.operation for entry in engine.journal] == operations
    train(model, optimizer, x)
    deployed = apply_journal(build(), folder / "version1")
    assert torch.allclose(deployed(x), torch.tensor(expected["output"]), atol=1e-6)


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "moved aside"])
@pytest.mark.parametrize("locks", [True, False], ids=["locked", "no locks"])
def test_several_threads_save_and_one_loads(
    swap: bool, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on file systems that cannot swap names, or have no locks: nothing is lost, nothing is mixed."""
    if not swap:
        monkeypatch.setattr(directories, "exchange", lambda one, other: False)
    if not locks:
        monkeypatch.setattr(directories, "locked", lambda path, patience: nullcontext(False))
    path, failed = tmp_path / "run", list[Exception]()
    writers = [kills.parts() for _ in range(3)]
    kills.save(1.0, path, writers[0])

    def save(number: int) -> None:
        try:
            for k in range(5):
                kills.save(100.0 * number + k, path, writers[number])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    seen = {kills.verdict(path)}
    while any(thread.is_alive() for thread in threads):
        seen.add(kills.verdict(path))
    assert not failed
    assert seen == {"whole"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_handler_saves_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """At any moment: the handler's checkpoint is the later one, and stays."""
    path, own, other = tmp_path / "run", kills.parts(), kills.parts()
    calls, at = [0], [0]

    def interrupt(frame: Any, event: str, argument: object) -> Any:
        calls[0] += event == "line"
        if calls[0] == at[0] and event == "line":
            sys.settrace(None)
            frame.f_trace = None
            kills.save(1000.0 + at[0], path, other)
        return interrupt

    def interrupted() -> None:
        calls[0] = 0
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            write_checkpoint(path, content)
        finally:
            sys.settrace(before)

    kills.save(1.0, path, own)
    content = read_checkpoint(path)
    interrupted()
    for at[0] in random.Random(0).sample(range(1, calls[0]), 12):
        interrupted()
        assert kills.verdict(path) == "whole"
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_dead_drafts_are_swept_and_nothing_else(tmp_path: Path) -> None:
    own, path = kills.parts(), tmp_path / "run"
    kills.save(1.0, path, own)
    draft, other = directories.begin(path), tmp_path / ".run.new-00000000-0123456789abcdef"
    shutil.copytree(draft, other)  # of another machine, a moment ago
    shutil.copytree(path, directories.beside(path, "old"))
    mine = tmp_path / f".run.new-{unique()}"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    kills.save(2.0, path, own)
    assert {p.name for p in tmp_path.iterdir()} == {"run", other.name, mine.name}
    for old in (other, *other.iterdir()):
        os.utime(old, (0, 0))
    kills.save(3.0, path, own)
    assert {p.name for p in tmp_path.iterdir()} == {"run", mine.name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kills_lose_nothing(tmp_path: Path) -> None:
    """`make kills` does 500."""
    code = f"from benchmarks.kills import *; r = kills(8, Path({str(tmp_path)!r})); print(dict(r))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    found = Counter(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert found["kills"] == 8
    assert found["whole beside"]
    assert not kills.total(found, "lost")
    assert not kills.total(found, "mixed")
    assert not found["foreign files touched"]
    assert not found["left behind for good"]
    assert not found["saves afterwards that failed"]


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
        (os, "rename"),
        (directories, "exchange"),
        (Path, "mkdir"),
        (checkpoint_files, "bytes_of"),
        (checkpoint_files, "_put"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_leaves_the_old_or_the_new(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th call, for n = 1, 2, ... until all goes well."""
    if name == "rename":  # as on file systems that cannot swap two names
        monkeypatch.setattr(directories, "exchange", lambda one, other: False)
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


def test_a_scheduler_may_stand_on_the_optimizer_that_is_loaded(tmp_path: Path) -> None:
    model, opt, engine, x = begun("mlp")
    engine.prune_neurons({"0": [0, 3]})
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh("mlp", "Adam")
    scheduler = torch.optim.lr_scheduler.LambdaLR(other_opt, lambda step: 1.0)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    other_opt.zero_grad()
    assert train(other, other_opt, x) == train(model, opt, x)
    scheduler.step()
    assert equal(dict(model.state_dict()), dict(other.state_dict()))

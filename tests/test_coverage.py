"""The coverage benchmark, on models that take seconds: nothing wrong, nothing torn."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracker import NeuronEngine

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "coverage.py"


def run(path: Path, *options: str) -> list[dict[str, object]]:
    command = [sys.executable, str(SCRIPT), "--no-rival", "--results", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_three_models_and_what_is_known_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    few = ("--family", "zoo", "--only", "mlp,transformer,cumsum")
    rows = {r["name"]: r for r in run(path, *few)}
    assert [rows[n]["status"] for n in ("mlp", "transformer", "cumsum")] == [
        "correct",
        "correct",
        "refused",
    ]
    assert rows["mlp"]["difference"] < 1e-12 < rows["mlp"]["effect"]
    assert len(run(path, *few, "--resume")) == 3


def test_what_is_cut_wrongly_comes_out_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    measure = importlib.import_module("_measure")

    def prune_and_turn(self: NeuronEngine, units: dict[str, list[int]], **how: bool) -> object:
        receipt = cut(self, units, **how)
        model = self.tracker.current.model()
        with torch.no_grad():
            model[2].weight.copy_(model[2].weight.roll(1, 1).clone())
        return receipt

    cut, told = NeuronEngine.prune_units, {}
    measure.measure("zoo", "mlp", told.update)
    assert told["status"] == "correct"
    monkeypatch.setattr(NeuronEngine, "prune_units", prune_and_turn)
    monkeypatch.setattr(measure, "warm_up", lambda: None)
    measure.measure("zoo", "mlp", told.update)
    assert told["status"] == "wrong"
    assert told["difference"] > 1e-3


@pytest.mark.slow
def test_the_subset(tmp_path: Path) -> None:
    rows = run(tmp_path / "results.jsonl", "--subset")
    assert len(rows) > 45
    assert {r["status"] for r in rows} <= {"correct", "refused"}

"""Every demo and validation runs, from the root and from its folder; a broken engine fails."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tracker import NeuronEngine
from tracker.analysis import recommendations
from tracker.analysis.findings import LayerFindings
from tracker.checkpoint.checkpoint_files import FILES, MANIFEST
from tracker.reporting import text_reports
from tracker.statistics import Activity, Covariance

ROOT = Path(__file__).resolve().parent.parent
DEMOS = ROOT / "demos"

# What each script promises to leave in outputs/.
WRITES = {
    "simple_example": [],
    "simple_activation_demo": [],
    "neuron_tracker_demo": ["logs/neuron_mapping_result.json"],
    "activation_tracking_demo": [],
    "dataset_analysis_demo": [],
    "correlation_analysis_demo": ["visualizations/correlation_demo_fc2.png"],
    "training_tracker_demo": [
        "logs/training_history.json",
        "logs/recommendations.json",
        "reports/neuron_report.txt",
        "visualizations/activity_heatmap.png",
        "visualizations/evolution.png",
        "visualizations/correlation_fc1.png",
        "visualizations/correlation_fc2.png",
        "visualizations/changes.png",
    ],
    "self_modification_demo": [
        "visualizations/network_life.png",
        "reports/network_life.html",
        *(f"checkpoints/self_modified/{name}" for name in (*FILES, MANIFEST)),
    ],
    "slm_demo": [
        "visualizations/slm_life.png",
        "visualizations/slm_curves.png",
        "reports/slm_life.html",
        *(f"checkpoints/slm/{name}" for name in (*FILES, MANIFEST)),
    ],
    "simple_reporting_demo": [
        "visualizations/reporting_demo_heatmap.png",
        "reports/reporting_demo.txt",
        "reports/reporting_demo_heatmap.png",
    ],
    "surgery_demo": [],
    "optimization_recommendations_demo": ["logs/optimization_demo.json"],
    "dataset_success_validation": [],
    "correlation_success_validation": [],
    "training_success_validation": ["logs/validation_history.json"],
    "reporting_success_validation": [
        "visualizations/validation_heatmap.png",
        "reports/validation_report.txt",
        "reports/validation_report_heatmap.png",
    ],
    "optimization_success_validation": ["logs/validation_recommendations.json"],
    "pruning_success_validation": [],
    "expansion_success_validation": [],
}
SETTINGS = {"TRACKER_DEMO_SAMPLES": "300", "FASHION_MNIST_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Scripts:
    """Demos, run in processes that are forked from one which has imported torch."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "tests" / "script_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, script: str, outputs: Path) -> str:
        printed = outputs.with_suffix(".printed")
        job = {
            "script": str((DEMOS / f"{script}.py").relative_to(ROOT)),
            "folder": str(ROOT),
            "settings": {**SETTINGS, "TRACKER_OUTPUTS": str(outputs)},
            "printed": str(printed),
            "seconds": 120,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        code = self.server.stdout.readline().strip()
        said = printed.read_text(encoding="utf-8")
        assert code == "0", said
        return said


class Alone:
    """Demos, each run by a Python of its own, where processes cannot be forked."""

    def run(self, script: str, outputs: Path) -> str:
        return run(script, ROOT, outputs)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts | Alone]:
    if not hasattr(os, "fork"):
        yield Alone()
        return
    found = Scripts()
    with found.server:  # closes its input, at which it ends
        yield found


def run(script: str, folder: Path, outputs: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", os.path.relpath(DEMOS / f"{script}.py", folder)],
        cwd=folder,
        env={
            **os.environ,
            **SETTINGS,
            "TRACKER_OUTPUTS": str(outputs),
            "PYTHONIOENCODING": "utf-8",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_is_run_here() -> None:
    scripts = {path.stem for path in DEMOS.glob("*.py") if not path.stem.startswith("_")}
    assert scripts == {*WRITES, "specialise_demo"}  # which has a file of tests of its own


@pytest.mark.slow
@pytest.mark.parametrize("script", WRITES)
def test_demos_run_from_the_root(script: str, scripts: Scripts | Alone, tmp_path: Path) -> None:
    printed = scripts.run(script, tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert set(WRITES[script]) <= written
    assert all(path.stat().st_size > 8 for path in tmp_path.rglob("*.*"))
    if script.endswith("_validation"):
        assert "criteria met" in printed
        assert "FAIL" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("script", ["simple_example", "training_success_validation"])
def test_demos_run_from_their_folder(script: str, tmp_path: Path) -> None:
    run(script, DEMOS, tmp_path)


# Ways to break the engine, each of which one validation has to notice.


def lose_a_dead_neuron(original: Callable[..., Any], *args: Any) -> Any:
    dead = original(*args)
    dead["fc1"] = dead["fc1"][1:]
    return dead


def call_the_quiet_dead(original: Callable[..., Any], self: LayerFindings) -> Any:
    return self.layer.activity.firing_frequency < 0.98


def shift_the_means(original: Callable[..., Any], *args: Any) -> Any:
    value = original(*args)
    return value._replace(mean=value.mean + 1e-3)


def weaken_correlations(original: Callable[..., Any], *args: Any) -> Any:
    return [(i, j, r * 0.9995) for i, j, r in original(*args)]


def round_the_loss(original: Callable[..., Any], self: Any, epoch: int, *values: float) -> Any:
    return original(self, epoch, *(round(value, 3) for value in values))


def rank_by_id(original: Callable[..., Any], *args: Any) -> Any:
    return sorted(original(*args), key=lambda row: row[0])


def forget_to_prune(original: Callable[..., Any], *args: Any) -> Any:
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "owner", "name", "broken"),
    [
        ("dataset", NeuronEngine, "get_dead_neurons", lose_a_dead_neuron),
        ("dataset", LayerFindings, "dead", call_the_quiet_dead),
        ("dataset", Activity, "value", shift_the_means),
        ("correlation", Covariance, "pairs_above", weaken_correlations),
        ("training", NeuronEngine, "log_epoch_statistics", round_the_loss),
        ("training", Activity, "value", shift_the_means),
        ("reporting", text_reports, "ranking", rank_by_id),
        ("optimization", recommendations, "prune_layer", forget_to_prune),
        ("optimization", Covariance, "pairs_above", weaken_correlations),
    ],
)
def test_a_broken_engine_fails(
    script: str,
    owner: Any,
    name: str,
    broken: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in {**SETTINGS, "TRACKER_OUTPUTS": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(DEMOS)
    for helper in ("_common", "_checks", "_planting"):
        monkeypatch.delitem(sys.modules, helper, raising=False)  # it reads the environment
    original = getattr(owner, name)
    method = getattr(original, "func", original)  # of a cached property

    def wrapper(*args: Any) -> Any:
        return broken(method, *args)

    monkeypatch.setattr(owner, name, wrapper if method is original else property(wrapper))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DEMOS / f"{script}_success_validation.py"), run_name="__main__")
    assert ended.value.code == 1
    assert "FAIL" in capsys.readouterr().out

"""The journeys, written from README and docs alone, run to their ends."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

JOURNEYS = Path(__file__).resolve().parent.parent / "demos" / "journeys"
NEEDS = {"lightning_resume": "lightning", "transformers_resume": "transformers"}
PROCESSES = {"ddp"}  # starts others, which import it by its path
NAMES = sorted(path.stem for path in JOURNEYS.glob("*.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the frameworks
@pytest.mark.parametrize("name", NAMES)
def test_a_journey_ends_well(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASHION_MNIST_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(JOURNEYS.parents[1]))
    path = str(JOURNEYS / f"{name}.py")
    if name in PROCESSES:
        subprocess.run([sys.executable, path], check=True, timeout=300)
    else:
        runpy.run_path(path, run_name="__main__")


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures() -> None:
    nbformat = pytest.importorskip("nbformat")  # comes with nbclient
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(JOURNEYS / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    resources = {"metadata": {"path": str(JOURNEYS.parents[1])}}
    nbclient.NotebookClient(notebook, timeout=300, iopub_timeout=60, resources=resources).execute()
    shown = [output.get("data", {}) for cell in code for output in cell.outputs]
    assert sum("image/png" in data for data in shown) == 2
    assert shown[-1]["text/plain"] == "True"
    assert any("text/html" in data and "calibrated" in data["text/html"] for data in shown)

"""What the project promises as a whole: its layout, its requirements, what an import costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYOUT = [
    "tracker/__init__.py",
    "tracker/tracker.py",
    "tracker/analyzer.py",
    "tracker/reporter.py",
    "outputs/logs",
    "outputs/reports",
    "outputs/visualizations",
    "outputs/checkpoints",
    "demos/simple_example.py",
    "demos/simple_activation_demo.py",
    "demos/neuron_tracker_demo.py",
    "demos/activation_tracking_demo.py",
    "demos/dataset_analysis_demo.py",
    "demos/correlation_analysis_demo.py",
    "demos/training_tracker_demo.py",
    "demos/simple_reporting_demo.py",
    "demos/optimization_recommendations_demo.py",
    "demos/dataset_success_validation.py",
    "demos/correlation_success_validation.py",
    "demos/training_success_validation.py",
    "demos/reporting_success_validation.py",
    "demos/optimization_success_validation.py",
    "data",
    "fashion_mnist_mlp.py",
    "test_tracker.py",
    "requirements.txt",
    "README.md",
]


@pytest.mark.parametrize("path", LAYOUT)
def test_layout(path):
    assert (ROOT / path).exists()


TOP = {
    "tracker", "demos", "outputs", "data", "tests", "benchmarks", "docs", "fashion_mnist_mlp.py", "test_tracker.py",
    "requirements.txt", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml",
}  # fmt: skip


def test_nothing_else_lies_at_the_top():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= TOP


def test_requirements_are_those_of_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    # By hand, because tomllib came with Python 3.11.
    project = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert required == re.findall(r'"(.+)"', block[1])


@pytest.mark.parametrize("module", ["matplotlib", "torchvision"])
def test_import_is_light(module):
    code = f"import sys, tracker; sys.exit({module!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_readers_of_data_are_light():
    code = "import sys, fashion_mnist_mlp; sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


FRAMEWORKS = r"(transformers|accelerate|lightning|onnxruntime|onnxscript|gguf|peft)\b"


def test_what_needs_a_framework_is_run_with_it():
    """`make frameworks` runs every file with tests that are skipped where a framework is not installed."""
    listed = re.search(
        r"^FRAMEWORK_TESTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M
    )
    paths = [ROOT / path for path in listed[1].replace("\\\n", " ").split()]
    assert [path for path in paths if not path.exists()] == []
    needs = re.compile(rf'importorskip\("{FRAMEWORKS}|[A-Z]+ = .*"{FRAMEWORKS}')
    found = [path for path in (ROOT / "tests").rglob("*.py") if needs.search(path.read_text())]
    assert len(found) > 10
    assert [p for p in found if not any(p.is_relative_to(path) for path in paths)] == []

"""Data goes down one staircase: imports may only point to rooms further down."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tracker"


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml on the package in a folder."""
    code = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(no_cache=True))"
    path = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=path
    )


def test_imports_point_down() -> None:
    """Rooms import from rooms below them, and nothing goes round in a circle."""
    done = contracts(PACKAGE.parent)
    assert done.returncode == 0, done.stdout


def test_an_import_that_climbs_is_found(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tracker", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    with (tmp_path / "tracker" / "utils" / "text.py").open("a") as file:
        file.write("\nfrom tracker.engine import NeuronEngine  # noqa\n")
    done = contracts(tmp_path)
    assert done.returncode == 1
    assert "tracker.utils is not allowed to import tracker.engine" in done.stdout


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text()
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    explained = sum((d.end_lineno or 0) - d.lineno + 1 for d in docstrings)
    assert len(text.splitlines()) - explained <= 420


def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & forbidden
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}


def test_the_page_names_what_is_there() -> None:
    """Each path of docs/architecture.md exists, and each room is on it."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+(?:\.py|\.json|/))`", page))
    missing = {n for n in named if not (PACKAGE / n).exists() and not (PACKAGE.parent / n).exists()}
    assert not missing
    rooms = {p.name + "/" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert rooms <= named


def test_each_room_has_its_folder_of_tests() -> None:
    """Tests of a room lie in the folder of its name; tests of the whole lie loose."""
    rooms = {
        p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("schemas", "__pycache__")
    }
    tests = Path(__file__).parent
    folders = {p.name for p in tests.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    assert folders == rooms

"""Data goes down one staircase: imports may only point to rooms further down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tracker"

# Each room may import from rooms before it.
ORDER = [
    "errors",
    "text",
    "checks",
    "files",
    "nested",
    "schema",
    "slotmap",
    "delegation",
    "statistics",
    "compensation",
    "layers",
    "identity",
    "calls",
    "signature",
    "progress",
    "chance",
    "probe",
    "batches",
    "structure",
    "observation",
    "reads",
    "graphs",
    "hooks",
    "snapshot",
    "tracker",
    "findings",
    "recommend",
    "history",
    "reports",
    "figures",
    "analyzer",
    "surgery",
    "journal",
    "memory",
    "distributed",
    "sharded",
    "session",
    "sessions",
    "watcher",
    "attachments",
    "changer",
    "calibrator",
    "compressor",
    "surgeon",
    "training",
    "trainer",
    "life",
    "page",
    "reporter",
    "recorder",
    "engine",
    "integrations",
    "export",
    "inspection",
    "__main__",
    "__init__",
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tracker":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {n[1] for n in names if n[0] == "tracker" and len(n) > 1}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_down(path: Path) -> None:
    here = ORDER.index(room(path))
    for target in imports(path):
        assert target in ORDER, f"{target} has no place in the order of rooms"
        assert ORDER.index(target) <= here, f"{room(path)} climbs to {target}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_rooms_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 450


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

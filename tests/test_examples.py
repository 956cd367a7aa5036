"""The examples in docstrings run, and each public call has one.

They go on from the example of `NeuronEngine`: its names are there in all of them.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import tracker
import tracker.export
import tracker.export.command  # it registers the exporters
import tracker.integrations
from tracker import NeuronEngine
from tracker.compensation import criteria
from tracker.export import registry as exporters
from tracker.reporting import text_reports
from tracker.structure.adapters import registry as adapters

MODULES = ["tracker", *(m.name for m in pkgutil.walk_packages(tracker.__path__, "tracker."))]
LONGEST = 14  # lines of input
FLAGS = doctest.ELLIPSIS
REGISTRIES = (
    text_reports._SECTIONS,
    exporters._EXPORTERS,
    adapters._ADAPTERS,
    criteria.CRITERIA,
)


def public() -> Iterator[tuple[str, Any]]:
    """Every call of the engine, and every function and class that users import."""
    for name, member in inspect.getmembers(NeuronEngine):
        if not name.startswith("_"):
            yield f"NeuronEngine.{name}", member
    for module in (tracker, tracker.export, tracker.integrations):
        for name in module.__all__:
            if not name.startswith("__"):
                yield f"{module.__name__}.{name}", getattr(module, name)


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_call_has_an_example(name: str) -> None:
    _, found, example = (inspect.getdoc(PUBLIC[name]) or "").partition("Examples:\n")
    assert found, f"{name} has no section Examples"
    lines = doctest.DocTestParser().get_examples(example)
    assert 1 <= len(lines) <= LONGEST, name


def begun() -> dict[str, Any]:
    """The names that examples go on from."""
    names: dict[str, Any] = {"NeuronEngine": NeuronEngine}
    with contextlib.redirect_stdout(io.StringIO()):
        for example in doctest.DocTestParser().get_examples(inspect.getdoc(NeuronEngine) or ""):
            exec(compile(example.source, "NeuronEngine", "single"), names)
    return names


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What an example registers goes with it."""
    for module in adapters._LATER.values():  # it registers when it is imported, and that is once
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    before = [dict(table) for table in REGISTRIES]
    yield
    for table, content in zip(REGISTRIES, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("tracker.integrations."):  # of frameworks that are extras
        pytest.importorskip(name, exc_type=ModuleNotFoundError)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if test.examples:
            test.globs = {**vars(module), **begun()}
            result = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test)
            assert result.failed == 0, test.name

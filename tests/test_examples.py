"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tracker

MODULES = ["tracker", *(m.name for m in pkgutil.walk_packages(tracker.__path__, "tracker."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    if name.startswith("tracker.integrations."):  # of frameworks that are extras
        pytest.importorskip(name, exc_type=ModuleNotFoundError)
    assert doctest.testmod(importlib.import_module(name)).failed == 0

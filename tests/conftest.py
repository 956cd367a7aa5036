"""The order of all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones first: of two processes none is left with a long test when the other has nothing more to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

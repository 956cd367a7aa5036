"""What makes copies of modules quick."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

_TABLES = (dict, OrderedDict, list, set)


def empty_tables(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """New tables, for the memo of a deep copy, by the ids of those of these modules' own that hold nothing.

    Most of a module's tables do, and they are quicker made than copied.
    """
    return {
        id(table): type(table)()
        for module in modules
        for table in vars(module).values()
        if type(table) in _TABLES and not table
    }

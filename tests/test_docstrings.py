"""Docstrings of public calls name each parameter, and those of records each attribute."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

import tracker
import tracker.export
import tracker.integrations
from tracker import NeuronEngine

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (tracker, tracker.export, tracker.integrations)
    for name in module.__all__
    if not name.startswith("__")
}


def calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All public functions, and methods of public classes."""
    for name, thing in PUBLIC.items():
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing) and not issubclass(thing, BaseException):
            for method, raw in vars(thing).items():
                made = getattr(thing, method)
                if not method.startswith("_") and callable(made) and not inspect.isclass(made):
                    assert raw is not None
                    yield f"{name}.{method}", made


def section(text: str, title: str) -> set[str]:
    """Names that a section of a docstring explains."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    rows = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", found[1] if found else "", re.M)
    return {name.strip("* ") for row in rows for name in row.split(",")}


CALLS = dict(calls())


@pytest.mark.parametrize("name", CALLS)
def test_each_parameter_is_named(name: str) -> None:
    function = CALLS[name]
    text = inspect.getdoc(function) or ""
    parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
    assert text
    if parameters:
        assert parameters == section(text, "Args"), name


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_each_attribute_of_a_record_is_named(name: str) -> None:
    kind = PUBLIC[name]
    assert inspect.getdoc(kind)
    named = fields(kind) if is_dataclass(kind) else ()
    known = [f.name for f in named] or list(getattr(kind, "_fields", ()))
    if kind is not NeuronEngine and known:
        shown = {n for n in known if not n.startswith("_")}
        assert shown <= section(inspect.getdoc(kind) or "", "Attributes"), name

"""Plain data compared with our own JSON Schemas: the keywords that they use, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "schemas"
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def load_schema(name: str) -> dict[str, Any]:
    """One of the schemas of this library, by its file's name."""
    schema: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return schema


def problems(data: Any, schema: dict[str, Any]) -> Iterator[str]:
    """What of `data` is not as the schema says, each with its place; nothing if all is well."""
    return _problems(data, schema, schema, "")


def _problems(data: Any, part: Any, root: dict[str, Any], where: str) -> Iterator[str]:
    if part is False:
        yield f"{where or 'the whole'} should not be there"
    if isinstance(part, bool):
        return
    if "$ref" in part:
        yield from _problems(data, root["$defs"][part["$ref"].rpartition("/")[2]], root, where)
    if (kinds := part.get("type")) is not None and not _is(data, kinds):
        yield f"{where or 'the whole'} is {_short(data)}, and should be {_kinds(kinds)}"
        return
    if "oneOf" in part:
        found = [list(_problems(data, choice, root, where)) for choice in part["oneOf"]]
        if sum(not each for each in found) != 1:
            yield min(found, key=len)[0] if all(found) else f"{where} can be read in two ways"
    if not _allowed(data, part):
        yield f"{where or 'the whole'} is {_short(data)}, which is not allowed"
    if isinstance(data, dict):
        yield from _in_object(data, part, root, where)
    elif isinstance(data, list):
        yield from _in_array(data, part, root, where)


def _allowed(data: Any, part: dict[str, Any]) -> bool:
    number = isinstance(data, int | float) and not isinstance(data, bool)
    size = len(data) if isinstance(data, list) else None
    return (
        ("const" not in part or _same(data, part["const"]))
        and ("enum" not in part or any(_same(data, value) for value in part["enum"]))
        and not (number and data < part.get("minimum", data))
        and not (number and data > part.get("maximum", data))
        and not (size is not None and size < part.get("minItems", size))
        and not (size is not None and size > part.get("maxItems", size))
        and not (size and part.get("uniqueItems") and len({json.dumps(v) for v in data}) < size)
        and not (isinstance(data, str) and not re.search(part.get("pattern", ""), data))
    )


def _in_object(
    data: dict[str, Any], part: dict[str, Any], root: dict[str, Any], where: str
) -> Iterator[str]:
    known = part.get("properties", {})
    for name in part.get("required", ()):
        if name not in data:
            yield f"{where or 'the whole'} has no {name!r}"
    for name, value in data.items():
        place = f"{where}.{name}" if where else name
        yield from _problems(name, part.get("propertyNames", True), root, f"the name {place}")
        inner = known[name] if name in known else part.get("additionalProperties", True)
        yield from _problems(value, inner, root, place)


def _in_array(
    data: list[Any], part: dict[str, Any], root: dict[str, Any], where: str
) -> Iterator[str]:
    first = part.get("prefixItems", [])
    for i, value in enumerate(data):
        inner = first[i] if i < len(first) else part.get("items", True)
        yield from _problems(value, inner, root, f"{where}[{i}]")


def _is(data: Any, kinds: str | list[str]) -> bool:
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind == "integer" and isinstance(data, float) and data.is_integer():
            return True
        if isinstance(data, TYPES[kind]) and (kind == "boolean" or not isinstance(data, bool)):
            return True
    return False


def _same(data: Any, value: Any) -> bool:
    return isinstance(data, bool) == isinstance(value, bool) and bool(data == value)


def _kinds(kinds: str | list[str]) -> str:
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def _short(data: Any) -> str:
    text = f"{type(data).__name__} of {len(data)}" if isinstance(data, dict | list) else repr(data)
    return text if len(text) < 80 else text[:77] + "..."

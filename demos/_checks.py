"""What the validations share: a line per criterion, stored activations, JSON Schema."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from _common import ROOT
from torch import Tensor, nn

SCHEMAS = ROOT / "tracker" / "schemas"


class Checks:
    """Prints PASS or FAIL for each criterion; `finish` ends the script, with 1 if one failed."""

    def __init__(self, title: str) -> None:
        self.title, self.results = title, []
        print(title)

    def check(self, criterion: str, passed: bool, measured: str) -> None:
        """One criterion, and the numbers that it was judged by."""
        self.results.append(bool(passed))
        print(f"{'PASS' if passed else 'FAIL'}  {criterion}: {measured}")

    def close(self, criterion: str, found: Any, expected: Any, tolerance: float) -> None:
        """Two arrays agree: no entry differs by more than `tolerance`, and none is NaN."""
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape or not found.size:
            self.check(criterion, False, f"shapes {found.shape} and {expected.shape}")
            return
        worst = np.abs(found - expected).max()  # NaN if there is one, and NaN is not <= anything
        text = f"largest difference {worst:.1e} of {found.size:,} values, allowed {tolerance:.0e}"
        self.check(criterion, worst <= tolerance, text)

    def finish(self) -> NoReturn:
        """The closing line."""
        passed, total = sum(self.results), len(self.results)
        print(f"{self.title}: {passed} of {total} criteria met")
        sys.exit(0 if total and passed == total else 1)


def observed_module(model: nn.Module, layer: str) -> nn.Module:
    """The module whose output is what the layer's consumers read: its ReLU, where one follows."""
    return getattr(model, layer.replace("fc", "relu"), None) or model.get_submodule(layer)


@contextmanager
def stored(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[np.ndarray]]]:
    """All activations of `layers`, kept as they pass: the costly way that the engine avoids.

    Each batch becomes one float64 array (samples, neurons).
    """
    kept: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}

    def keep(layer: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            kept[layer].append(output.detach().double().numpy().copy())

        return hook

    modules = {layer: observed_module(model, layer) for layer in layers}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def schema_problems(data: Any, name: str) -> list[str]:
    """Where `data` breaks tracker/schemas/`name`; without jsonschema only keys are compared."""
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    if importlib.util.find_spec("jsonschema") is None:
        return list(_wrong_keys(data, schema, schema["$defs"], "$"))
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema).iter_errors(data)
    return [f"{error.json_path}: {error.message}" for error in errors]


def _wrong_keys(data: Any, schema: Any, defs: Mapping[str, Any], place: str) -> Iterator[str]:
    """Keys that are missing or unknown, at any depth."""
    schema = defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if isinstance(data, list):
        for item in data:
            yield from _wrong_keys(item, schema.get("items", {}), defs, f"{place}[]")
    if not isinstance(data, dict):
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    yield from (
        f"{place}.{key} is missing" for key in schema.get("required", ()) if key not in data
    )
    for key, value in data.items():
        if key in known or others:
            yield from _wrong_keys(value, known.get(key, others), defs, f"{place}.{key}")
        elif others is False:
            yield f"{place}.{key} is unknown"

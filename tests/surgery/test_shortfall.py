"""A refused budget is told by the number that was asked for, and by what would meet it: which then does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.surgery.subjects import prepared
from tracker import NeuronEngine, SurgeryError


def refused(engine: NeuronEngine, keep: float, of: str = "parameters", **options: Any) -> str:
    with pytest.raises(SurgeryError) as refusal:
        engine.compress(keep, of, **options)
    text = str(refusal.value)
    assert f"{keep:.1%} cannot be kept" in text
    return text


def could_leave(text: str, way: str) -> float:
    found = re.search(rf"{way} could leave ([\d.]+)%", text)
    assert found, text
    return float(found[1]) / 100


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(
    ("name", "of", "held", "way", "freed"),
    [
        ("residual", "parameters", {"floor": 2}, "inexact=True", {"inexact": True}),
        ("mlp", "parameters", {"floor": {"0": 11, "2": 8}}, "lower floors", {}),
        ("mlp", "flops", {"protect": {"[02]": 0.6}}, "less protection", {}),
        ("conv", "neurons", {"protect": ["4", "7"], "floor": 3}, "less protection", {"floor": 3}),
        ("mlp", "parameters", {"round_to": 6}, "a smaller round_to", {}),
    ],
)
def test_what_is_said_to_free_does(
    rounds: int, name: str, of: str, held: dict[str, Any], way: str, freed: dict[str, Any]
) -> None:
    _model, _, engine, x = prepared(name)
    engine.calibrate([x])
    text = refused(
        engine, 0.05 if name == "residual" else 0.15, of, rounds=rounds, dry_run=True, **held
    )
    reach = could_leave(text, way)
    stuck = float(re.search(r"leaves ([\d.]+)%", text)[1]) / 100  # type: ignore[index]
    assert reach < stuck
    asked = (reach + stuck) / 2
    receipt = engine.compress(asked, of, dry_run=True, **freed)
    assert engine.compress(min(stuck + 0.02, 0.99), of, dry_run=True, **held).units
    if of == "parameters":
        assert receipt.parameters_after / receipt.parameters_before < stuck


def test_steps_of_width_are_told_as_such() -> None:
    _model, _, engine, x = prepared("mlp")
    engine.calibrate([x])
    text = refused(engine, 0.62, strict=True, round_to=4, rounds=1)
    assert "widths change in steps" in text
    assert "Lower `round_to`" in text
    near = [float(n) / 100 for n in re.findall(r"([\d.]+)%", text)[1:]]
    reached = engine.compress(near[0], round_to=4, dry_run=True)
    assert reached.parameters_after / reached.parameters_before == pytest.approx(near[0], abs=2e-3)


def test_the_nearest_below_is_of_the_whole_that_was_asked_for() -> None:
    _model, _, engine, x = prepared("mlp")
    engine.calibrate([x])
    receipt = engine.compress(0.41, round_to=3, rounds=2)
    told = [n for n in receipt.notes if "was asked" in n]
    left = receipt.parameters_after / receipt.parameters_before
    for note in told:
        assert note.startswith(
            f"41.0% of the parameters was asked; as widths change in steps, {left:.1%}"
        )


def test_nothing_to_compress_says_what_would_help() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(16, 4))
    text = refused(engine, 0.5)
    assert "over the units of 0; inexact=True could leave" in text
    assert engine.compress(0.5, inexact=True, dry_run=True).units

"""The picture of the groups says what the structure says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo import ZOO
from tracker import StructureError
from tracker.structure import trace_structure

pytest.importorskip("matplotlib")


def drawn(name: str) -> tuple[Any, list[str]]:
    structure = trace_structure(ZOO[name].build(), ZOO[name].inputs())
    (axes,) = structure.plot().axes
    return structure, [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", ["mlp", "resnet_blocks", "transformer", "lstm", "tied_embedding"])
def test_every_group_and_every_layer_is_there(name: str) -> None:
    structure, texts = drawn(name)
    layers = {tensor.rpartition(".")[0] for tensor, _ in structure.integers.places}
    assert layers <= {*texts}
    for group in structure.groups:
        said = [t for t in texts if t.startswith(f"{group.size} ")]
        assert said
        assert group.prunable or any(t.endswith(", pinned") for t in said)


def test_frozen_axes_are_written_with_their_widths() -> None:
    _, texts = drawn("mlp")
    assert sorted(texts) == ["0", "16 neurons", "2", "3", "4", "6", "9 neurons"]


def test_it_is_written_and_the_model_may_be_too_large(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(61)))
    structure = trace_structure(model, torch.randn(2, 4), trial=False)
    with pytest.raises(StructureError, match="has 61 layers: a picture can show 60"):
        structure.plot(tmp_path / "large.png")
    assert not (tmp_path / "large.png").exists()
    small = trace_structure(model[:3], torch.randn(2, 4), trial=False)
    small.plot(tmp_path / "new" / "small.png")
    assert (tmp_path / "new" / "small.png").stat().st_size > 1000

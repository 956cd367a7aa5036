"""Integers of a model's own code: found, solved before anything is touched, and set; or refused, the line named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.models import (
    Attention,
    B,
    C,
    Configured,
    DefaultScale,
    Forgetful,
    Fused,
    GroupedConv,
    LiteralSlice,
    LiteralView,
    OneHeadWidth,
    Reciprocal,
    Rescaled,
    Shaped,
    Split,
    T,
    attributes_of,
    engine_of,
    groups_of,
    image,
    output,
    prune_each,
    tokens,
)
from tests.structure.oracle_masks import relative_difference
from tracker import SurgeryError
from tracker.structure.code_sizes.traced_int import Attribute, TracedInt, evaluate, expression, text


@pytest.mark.parametrize("build", [Attention, Fused, Split, Configured], ids=lambda b: b.__name__)
def test_attention_loses_heads_and_head_dimensions(build: Any) -> None:
    found = prune_each(build, tokens())
    sizes = {(name.split()[-1], size) for name, size in found.items()}
    assert ("head", 4) in sizes or ("head_dim", 4) in sizes
    assert any(size == 6 for _, size in sizes)


@pytest.mark.parametrize("build", [Shaped, Forgetful, OneHeadWidth], ids=lambda b: b.__name__)
def test_sizes_follow(build: Any) -> None:
    assert prune_each(build, tokens())


def test_attributes_are_what_the_code_needs() -> None:
    model = Split()
    engine = engine_of(model, tokens())
    heads = next(g for g in groups_of(engine) if g.size == 4)
    engine.prune_units({heads.name: [1]})
    assert (model.num_heads, model.split_size, model.head_dim) == (3, 18, 6)
    assert model.scale == 6**-0.5
    engine.undo()
    assert (model.num_heads, model.split_size) == (4, 24)


def test_a_configuration_that_others_hold_is_not_written_to() -> None:
    model = Configured()
    other, config = Configured(), model.config
    other.config = config
    engine = engine_of(model, tokens())
    heads = next(g for g in groups_of(engine) if g.size == 4)
    engine.prune_units({heads.name: [0]})
    assert model.config.heads == 3
    assert model.layers[0].config is model.layers[1].config is model.config
    assert config.heads == 4
    engine.undo()
    assert model.config is config


def test_a_tuple_is_set_in_its_place() -> None:
    model = Shaped()
    engine = engine_of(model, tokens())
    group = next(g for g in groups_of(engine) if g.size == 5)
    engine.prune_units({group.name: [0, 3]})
    assert model.shape == (4, 3)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (LiteralSlice, "h[..., :10]"),
        (LiteralView, "view(2, 5, 4, 5)"),
        (Rescaled, "math.sqrt(self.head_dim)"),
        (Reciprocal, "a number in the model's code"),
        (DefaultScale, "F.scaled_dot_product_attention(q, k, v)"),
    ],
)
def test_what_cannot_follow_is_refused_and_the_line_named(build: Any, line: str) -> None:
    model = build()
    engine = engine_of(model, tokens())
    refused = [g for g in engine.structure.groups if not g.prunable]
    assert any(line in g.reason for g in refused), [g.reason for g in refused]
    with pytest.raises(SurgeryError, match="cannot be pruned"):
        engine.prune_units({refused[0].name: [0]})


def test_a_choice_that_cannot_follow_is_refused_before_anything_is_touched() -> None:
    model = Forgetful()
    engine = engine_of(model, tokens())
    group = groups_of(engine)[0]
    before = attributes_of(model)
    some = next(g for g in groups_of(engine) if g.size == 10)
    with pytest.raises(SurgeryError):
        engine.prune_units({some.name: list(range(10))})
    assert group.prunable
    assert attributes_of(model) == before
    engine.prune_units({some.name: [0, 9]})
    assert model.cut == 8


def test_a_failure_afterwards_leaves_the_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()
    engine = engine_of(model, tokens())
    before = attributes_of(model)
    heads = next(g for g in groups_of(engine) if g.size == 4)

    def fail(*args: Any) -> None:
        raise RuntimeError("by design")

    monkeypatch.setattr("tracker.surgery.transaction._as_expected", fail)
    with pytest.raises(RuntimeError, match="by design"):
        engine.prune_units({heads.name: [0]})
    assert attributes_of(model) == before
    assert model(tokens()).shape == (B, T, C)


def test_filters_inside_every_group_of_a_convolution() -> None:
    model = GroupedConv()
    engine = engine_of(model, image())
    assert {g.size for g in groups_of(engine)} >= {4}
    for group in groups_of(engine):
        sizes = (model[2].groups, model[2].in_channels, model[2].out_channels)
        engine.prune_units({group.name: [1]})
        conv = model[2]
        assert conv.weight.shape[:2] == (conv.out_channels, conv.in_channels // conv.groups)
        assert model[0].out_channels == conv.in_channels
        engine.undo()
        assert (model[2].groups, model[2].in_channels, model[2].out_channels) == sizes
    assert prune_each(GroupedConv, image())


def test_arithmetic_keeps_expressions() -> None:
    a, b = Attribute("m", (), "a"), Attribute("m", (), "b")
    x, y = TracedInt(12, a), TracedInt(5, b)
    value = (x * 2 + y) // 3 - x % 7
    assert value == (12 * 2 + 5) // 3 - 12 % 7
    assert evaluate(expression(value), {a: 12, b: 5}.__getitem__) == value
    assert evaluate(expression(-x + 100), {a: 3}.__getitem__) == 97
    assert text(expression(x // y)) == "self.a // self.b"
    assert type(x / 4) is float
    assert type(copy.deepcopy(x)) is int


def test_followers_follow() -> None:
    model = Split()
    engine = engine_of(model, tokens())
    average = torch.optim.swa_utils.AveragedModel(model)
    engine.attach_follower(average)
    heads = next(g for g in groups_of(engine) if g.size == 4)
    engine.prune_units({heads.name: [2]})
    assert average.module.num_heads == 3
    assert relative_difference(output(average, tokens()), output(model, tokens())) == 0
    engine.undo()
    assert average.module.split_size == 24


def test_a_model_that_cannot_be_copied_or_wants_plain_integers_is_traced_all_the_same() -> None:
    class Strict(Split):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.num_heads) is not int:
                raise TypeError("an int, please")
            return super().forward(x)

    model = Strict()
    engine = engine_of(model, tokens())
    assert engine.structure.integers.facts == []
    assert any("does not follow" in g.reason for g in engine.structure.groups)


def test_tracing_leaves_the_integers_plain() -> None:
    model = nn.Sequential(GroupedConv(), nn.Flatten(), nn.Linear(80, 4))
    before = attributes_of(model.eval())
    engine = engine_of(model, image())
    assert len(engine.structure.groups) > 1
    assert attributes_of(model) == before
    assert not any(isinstance(v, TracedInt) for m in model.modules() for v in vars(m).values())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="a newer torch has it")
def test_multiples_of_an_alignment() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, C, 16))
            self.down = nn.Parameter(torch.randn(2, 16, C))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([4, 10], dtype=torch.int32)
            h = F.grouped_mm(x.flatten(0, 1), self.up, offs=ends).relu()
            return F.grouped_mm(h, self.down, offs=ends)

    model = Experts()
    engine = engine_of(model, tokens())
    (group,) = groups_of(engine)
    assert (group.size, group.multiple_of) == (16, 4)
    with pytest.raises(SurgeryError, match=r"16 bytes.*Multiples of 4"):
        engine.prune_units({group.name: [0, 1, 2]})
    receipt = engine.prune_units({group.name: [0, 5, 6, 13]})
    assert receipt.output_difference < 1e-9
    assert model.up.shape == (2, C, 12)

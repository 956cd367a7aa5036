"""Integers of a model's own code: found, solved before anything is touched, and set; or refused, the line named."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, no_fast_path, randomise, relative_difference
from tracker import NeuronEngine, SurgeryError
from tracker.structure.ints import Attribute, TInt, evaluate, expression, text

B, T, C, H = 2, 5, 12, 4  # batch, tokens, width, heads


class Attention(nn.Module):
    """Three projections, sizes as attributes, the scale kept."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(C, 24) for _ in range(3))
        self.out = nn.Linear(24, C)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        return self.out(h.reshape(x.shape[0], -1, self.num_heads * self.head_dim))


class Fused(Attention):
    """One projection for all three, its parts by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 72)
        del self.q, self.k, self.v

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(b, n, -1))


class Split(Attention):
    """Parts by `split` with an attribute, heads by division."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 72)
        self.split_size = 24
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, x.size(-1) // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, self.qkv(x).split(self.split_size, dim=2))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(h.transpose(1, 2).flatten(2))


class Configured(nn.Module):
    """Two layers read one configuration."""

    class Layer(Attention):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.config = config
            del self.num_heads

        def heads(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return x + self.out(h.transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=4)
        self.layers = nn.ModuleList(self.Layer(self.config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Shaped(nn.Module):
    """A tuple attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 20), nn.Linear(20, C)
        self.shape = (4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu().view(*x.shape[:-1], *self.shape).transpose(-1, -2)
        return self.down(h.transpose(-1, -2).flatten(-2))


class Forgetful(nn.Module):
    """A unit that a cut at an attribute's place moves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.a, self.b = nn.Linear(C, 16), nn.Linear(10, C), nn.Linear(6, C)
        self.cut = 10

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.a(h[..., : self.cut]) + self.b(h[..., self.cut :])


class LiteralSlice(Forgetful):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.a(h[..., :10]) + self.b(h[..., 10:])


class LiteralView(Shaped):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu().view(2, 5, 4, 5)
        return self.down(h.transpose(-1, -2).transpose(-1, -2).flatten(-2))


class Rescaled(Attention):
    """The scale is made anew of the width at every call."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(B, T, -1))


class Reciprocal(Attention):
    """The scale is a float from the start, and queries are normalised: removal is not that of the masked model."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        h = (q.softmax(-1) @ k.transpose(-2, -1) * (1.0 / self.head_dim)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).flatten(2))


class DefaultScale(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedConv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, groups=4),
            nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        )


class OneHeadWidth(nn.Module):
    """Heads whose width is that of the whole divided by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.heads = nn.Linear(C, 12), nn.Linear(12, C), 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        h = h.view(*x.shape[:-1], self.heads, h.shape[-1] // self.heads)
        return self.down(h.flatten(-2))


class Torchs(nn.Module):
    """torch's own attention, called with masks and for its weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, H, **{"batch_first": True, **options})
        self.out = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, 3] = True
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        h, weights = self.attention(x, x, x, hidden, attn_mask=mask)
        return self.out(h) + weights.mean()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, H, 20, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(C, 4))


def tokens() -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def engine_of(model: nn.Module, x: Tensor) -> NeuronEngine:
    randomise(model, 0)
    engine = NeuronEngine()
    engine.track_model(model.eval(), "m", example_inputs=x)
    return engine


def groups_of(engine: NeuronEngine, kind: str | None = None) -> list[Any]:
    return [g for g in engine.structure.groups if g.prunable and kind in (None, g.kind)]


def output(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad(), no_fast_path():
        return copy.deepcopy(model).double().eval()(x.double())


def attributes_of(model: nn.Module) -> list[Any]:
    return [
        (type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple, float, str))})
        for m in model.modules()
    ]


def prune_each(build: Any, x: Tensor) -> dict[str, int]:
    """Remove a third of each group of a fresh model, and compare with the oracle; kinds and sizes of the groups."""
    found = {}
    first = build()
    for group in groups_of(engine_of(first, x)):
        model = build()
        engine = engine_of(model, x)
        group = engine.structure[group.name]
        count = max(1, group.size // 3 // group.multiple_of) * group.multiple_of
        units = list(range(group.size))[1::2][:count] if group.multiple_of == 1 else range(count)
        before, plain = attributes_of(model), copy.deepcopy(model)
        whole = output(model, x)
        engine.prune_units({group.name: list(units)})
        if group.exact:
            masks = [masked_copy(plain, group, units, silence=s) for s in (False, True)]
            after = output(model, x)
            assert min(relative_difference(after, output(m, x)) for m in masks) < 1e-9, group.name
        assert sum(p.numel() for p in model.parameters()) < sum(
            p.numel() for p in plain.parameters()
        )
        assert engine.structure.coverage > 0  # and it can be traced again
        engine.undo()
        assert attributes_of(model) == before
        assert relative_difference(output(model, x), whole) == 0
        found[f"{group.name} {group.kind}"] = group.size
    return found


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


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"bias": False}, {"kdim": C, "vdim": C}], ids=str
)
def test_attention_of_torch_loses_heads(options: dict[str, Any]) -> None:
    found = prune_each(lambda: Torchs(**options), tokens())
    assert any(size == H for size in found.values())


def test_separate_projections_of_torchs_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Linear(C, 7)
            self.attention = nn.MultiheadAttention(C, H, kdim=7, vdim=7, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            m = self.memory(x)
            return self.attention(x, m, m, need_weights=False)[0]

    found = prune_each(Cross, tokens())
    assert any(size == H for size in found.values())
    assert 7 in found.values()


def test_encoder_layers_of_torch() -> None:
    found = prune_each(encoder, tokens())
    assert sum(size == H for size in found.values()) == 2


def test_the_fused_encoder_is_not_taken_and_training_goes_on() -> None:
    model = encoder()
    engine = engine_of(model, tokens())
    heads = next(g for g in groups_of(engine) if g.size == H)
    names = list(model.state_dict())
    engine.prune_units({heads.name: [1]})
    assert list(model.state_dict()) == names
    with torch.no_grad():
        fast = model(tokens())  # eval mode, no gradients: torch would take its fused layer
    assert relative_difference(fast, model(tokens()).detach()) < 1e-5
    model.train()(tokens()).square().mean().backward()
    again = pickle.loads(pickle.dumps(model[0].layers[0].self_attn))
    assert again.num_heads == H - 1
    engine.undo()
    assert type(model[0].layers[0].self_attn) is nn.MultiheadAttention


def test_padding_after_a_removal_in_a_later_layer() -> None:
    model = encoder()
    engine = engine_of(model, tokens())
    heads = [g for g in groups_of(engine) if g.size == H]
    engine.prune_units({heads[1].name: [1]})
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():  # nested tensors, if torch had its way
        fast = model[0](tokens(), src_key_padding_mask=padding)
        with no_fast_path():
            slow = model[0](tokens(), src_key_padding_mask=padding)
    assert torch.allclose(fast[~padding], slow[~padding], atol=1e-6)
    engine.undo()
    assert model[0].use_nested_tensor


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_the_twin_gives_what_torch_gives(need_weights: bool, masked: bool, batched: bool) -> None:
    from tracker.structure.twins import liberate

    theirs = nn.MultiheadAttention(C, H, batch_first=True).double().eval()
    randomise(theirs, 0)
    ours = copy.deepcopy(theirs)
    liberate(ours)
    x = tokens().double() if batched else tokens().double()[0]
    padding = torch.zeros(x.shape[:-1], dtype=torch.bool)
    padding[..., 4] = True
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    for options in (
        {"attn_mask": mask, "key_padding_mask": padding} if masked else {},
        {"attn_mask": mask, "is_causal": masked},
        {"average_attn_weights": False},
    ):
        a = theirs(x, x, x, need_weights=need_weights, **options)
        b = ours(x, x, x, need_weights=need_weights, **options)
        assert torch.allclose(a[0], b[0])
        assert (a[1] is None) == (b[1] is None)
        assert a[1] is None or torch.allclose(a[1], b[1])


def test_arithmetic_keeps_expressions() -> None:
    a, b = Attribute("m", (), "a"), Attribute("m", (), "b")
    x, y = TInt(12, a), TInt(5, b)
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
    assert not any(isinstance(v, TInt) for m in model.modules() for v in vars(m).values())


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

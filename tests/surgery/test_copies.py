"""Blocks that come as silent copies behind themselves: nothing moves, all of it can learn, and it is remembered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.bits import equal, everything, holds_the_live, weights
from tests.surgery.test_depth import TOKENS, Transformer, X, output, train, trained
from tracker import NeuronEngine, SurgeryError, apply_journal


class Encoder(nn.Module):
    """Torch's own blocks, whose attention reads weights of a layer that is never called."""

    def __init__(self, *, norm_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=norm_first, batch_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, is_causal=False)
        return self.head(x)


class Residual(nn.Module):
    """As in ResNets: convolutions and norms, a sum, a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), Residual(), nn.Flatten(), nn.Linear(150, 3))


IMAGES = torch.randn(16, 2, 7, 7, generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "pre-norm": (Transformer, "blocks.1", TOKENS),
    "torch's encoder": (Encoder, "blocks.0", TOKENS),
    "convolutions": (images, "2", IMAGES),
}


def made(name: str) -> tuple[Any, str, Tensor]:
    torch.manual_seed(0)
    build, after, x = CASES[name]
    return build(), after, x


@pytest.mark.parametrize("name", CASES)
def test_a_copy_comes_unnoticed_and_learns(name: str) -> None:
    model, after, x = made(name)
    optimizer, engine = trained(model, x)
    every, old, before = output(model, x), weights(model), everything(model, optimizer, engine)
    receipt = engine.insert_layer(after=after)
    assert receipt.promise == "exact"
    assert torch.equal(output(model, x), every)
    new = weights(model)
    assert all(torch.equal(new[k], v) for k, v in old.items())
    block = dict(model.get_submodule(after).named_parameters())
    inner = {k for k in block if not k.startswith("inserted.")}
    assert {k.removeprefix("inserted.") for k in block if k.startswith("inserted.")} == inner
    assert holds_the_live(model, optimizer)
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)
    engine.insert_layer(after=after)
    inserted = model.get_submodule(f"{after}.inserted")
    start = {n: p.detach().clone() for n, p in inserted.named_parameters()}
    for _ in range(6):
        train(model, x, optimizer)
    still = {n for n, p in inserted.named_parameters() if torch.equal(p, start[n])}
    assert not still, still
    assert torch.equal(output(copy.deepcopy(model), x), output(model, x))
    assert engine.insert_layer(after=f"{after}.inserted").promise == "exact"


def test_each_parameter_learns_as_its_original_does() -> None:
    model, after, x = made("pre-norm")
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": norms, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    )
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.insert_layer(after=after)
    names = {id(p): n for n, p in model.named_parameters()}
    without, decayed = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert all("norm" in name for name in without)
    assert not any("norm" in name for name in decayed)
    assert {n for n in without | decayed if ".inserted." in n} == {
        n for n in names.values() if ".inserted." in n
    }


@pytest.mark.parametrize("name", CASES)
def test_it_is_remembered(name: str, tmp_path: Path) -> None:
    """Copies of changed blocks too, and changed themselves."""
    model, after, x = made(name)
    optimizer, engine = trained(model, x)
    group = next(
        g
        for g in engine.structure.groups
        if g.prunable and g.exact and g.layers[0].startswith(after)
    )
    engine.prune_units({group.name: list(range(group.multiple_of))})
    engine.insert_layer(after=after)
    inner = next(
        g
        for g in engine.structure.groups
        if g.prunable and g.exact and g.layers[0].startswith(f"{after}.inserted")
    )
    engine.prune_units({inner.name: list(range(inner.multiple_of))})
    train(model, x, optimizer)
    engine.save_checkpoint(tmp_path / "saved")
    fresh = made(name)[0]
    again = torch.optim.Adam(fresh.parameters(), lr=1e-2)
    NeuronEngine.load_checkpoint(tmp_path / "saved", fresh, again)
    assert torch.equal(output(fresh, x), output(model, x))
    for each, opt in ((model, optimizer), (fresh, again)):
        train(each, x, opt)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    bare = apply_journal(made(name)[0], tmp_path / "saved")
    assert [p.shape for p in bare.parameters()] == [p.shape for p in model.parameters()]


def test_it_goes_again() -> None:
    model, after, x = made("pre-norm")
    optimizer, engine = trained(model, x)
    every, size = output(model, x), sum(p.numel() for p in model.parameters())
    engine.insert_layer(after=after)
    receipt = engine.remove_layer(f"{after}.inserted", force=True)
    assert receipt.parameters_after == size
    assert torch.allclose(output(model, x), every, atol=1e-5)
    assert holds_the_live(model, optimizer)
    train(model, x, optimizer)


def test_what_no_copy_can_follow_is_refused() -> None:
    """A norm behind the sum; a block that changes the shape; one that is called twice."""
    torch.manual_seed(0)
    twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    cases: list[tuple[nn.Module, Tensor, str, str]] = [
        (Encoder(norm_first=False), TOKENS, "blocks.0", "a norm stands behind its sum"),
        (
            nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Linear(4, 2)),
            X,
            "0",
            "shape of its input",
        ),
        (nn.Sequential(nn.Linear(6, 8), twice, twice), X, "1", "called 2 times"),
    ]
    for model, x, after, why in cases:
        optimizer, engine = trained(model, x)
        before = everything(model, optimizer, engine)
        with pytest.raises(SurgeryError, match=why):
            engine.insert_layer(after=after)
        assert equal(everything(model, optimizer, engine), before)


class Experts(nn.Module):
    """Weights of one module, read one after the other: only the last may be zero, or none would ever learn."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x @ self.up) @ self.down


def test_of_several_weights_of_a_module_only_the_last_is_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Experts()), nn.Linear(6, 2))
    _, engine = trained(model, X)
    engine.insert_layer(after="1")
    inserted = model[1].inserted[0]
    assert torch.equal(inserted.up, model[1][0].up)
    assert not inserted.down.any()


def language_model(kind: str) -> tuple[Any, Tensor]:
    """A small one of transformers, and tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    if kind != "Llama":
        sizes |= {"layer_types": mixed, "sliding_window": 4}
    if kind.startswith("Qwen"):
        sizes["use_sliding_window"] = True
    if kind.startswith("Gemma"):
        sizes["head_dim"] = 4
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model, torch.randint(64, (2, 7))


def test_models_whose_configuration_counts_otherwise_are_refused() -> None:
    """With a cache, generation would fail later."""
    model, tokens = language_model("Qwen2")
    model.config.layer_types = [*model.config.layer_types, "full_attention"]
    engine = NeuronEngine()
    engine.track_model(model, "qwen", {"input_ids": tokens, "use_cache": False})
    before = weights(model)
    with pytest.raises(SurgeryError, match="caches made of it would have no room"):
        engine.insert_layer(after="model.layers.1")
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Gemma2"])
def test_configurations_that_list_their_blocks_list_the_new_ones(kind: str, tmp_path: Path) -> None:
    """Two of them, of different kinds of attention; caches are made of the list."""
    model, tokens = language_model(kind)
    theirs = model.config
    before = list(theirs.layer_types)
    engine = NeuronEngine()
    engine.track_model(model, "model", {"input_ids": tokens})

    def generated(use_cache: bool = True) -> Tensor:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(tokens, use_cache=use_cache, **options)

    expected = generated()
    for after in ("model.layers.1", "model.layers.2"):
        assert engine.insert_layer(after=after).promise == "exact"
        assert torch.equal(generated(), expected)
    assert model.config.layer_types == [*before, before[1], before[2]]
    assert theirs.layer_types == before
    with torch.no_grad():  # once they say something, what is cached must be their own
        for place in (1, 2):
            inserted = model.model.layers[place].inserted
            inserted.mlp.down_proj.weight.normal_(std=0.5)
            inserted.self_attn.o_proj.weight.normal_(std=0.5)
    assert torch.equal(generated(True), generated(False))
    engine.save_checkpoint(tmp_path / "saved")
    fresh, _ = language_model(kind)
    NeuronEngine.load_checkpoint(tmp_path / "saved", fresh)
    assert fresh.config.layer_types == model.config.layer_types
    said, model = generated(), fresh
    assert torch.equal(generated(), said)


def test_caches_of_language_models_have_room_for_it() -> None:
    model, tokens = language_model("Llama")
    engine = NeuronEngine()
    engine.track_model(model, "llama", {"input_ids": tokens})
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert engine.insert_layer(after="model.layers.1").promise == "exact"
    inserted = model.model.layers[1].inserted
    assert inserted.self_attn.layer_idx == 3
    assert model.config.num_hidden_layers == 4
    found = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    with torch.no_grad():  # once it says something, what is cached must be its own
        inserted.mlp.down_proj.weight.normal_(std=0.5)
        inserted.self_attn.o_proj.weight.normal_(std=0.5)
    cached, plain = (
        model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    engine.undo()
    assert model.config.num_hidden_layers == 3

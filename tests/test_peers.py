"""The peers of the benchmark of one budget, on a tiny Llama: nothing removed is the dense model; budgets are met."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")

BATCHES = list(torch.randint(0, 50, (4, 2, 24), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """One of them as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.mul_(3) if "norm" not in name else p.uniform_(0.5, 2)
    return made


@torch.no_grad()
def logits(model: Any, x: Tensor = BATCHES[0]) -> Tensor:
    return model(input_ids=x, use_cache=False).logits


def size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("module", "call", "options"),
    [
        ("_peer_flap", "flap", {}),
        ("_peer_flap", "flap", {"attention": False}),
        ("_peer_shortgpt", "shortgpt", {}),
        ("_peer_slicegpt", "slicegpt", {}),
        ("_peer_slicegpt", "slicegpt", {"shared": True}),
    ],
)
def test_a_share_of_all_parameters_stays(
    peer: Any, model: Any, module: str, call: str, options: dict[str, bool]
) -> None:
    before, target = logits(model), 0.7 * size(model)
    getattr(peer(module), call)(model, BATCHES, 0.7, **options)
    block = 3 * 48 * 80 + 2 * 48 * (48 + 24) + 2 * 48
    slack = block if call == "shortgpt" else 5000
    assert target - slack <= size(model) <= target
    after = logits(model)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "call"), [("_peer_flap", "flap"), ("_peer_shortgpt", "shortgpt")]
)
def test_nothing_goes_where_all_stays(peer: Any, model: Any, module: str, call: str) -> None:
    before, count = logits(model), size(model)
    getattr(peer(module), call)(model, BATCHES, 1.0)
    assert size(model) == count
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("shared", [False, True])
def test_rotation_alone_leaves_the_outputs(peer: Any, model: Any, shared: bool) -> None:
    before = logits(model)
    sliced = peer("_peer_slicegpt")
    sliced.slice_to_width(model, BATCHES, 48, shared)
    assert torch.allclose(logits(model), before, atol=1e-4)
    assert before.abs().max() > 1
    assert (model.lm_head.weight is model.model.embed_tokens[0].weight) if shared else True


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_stored_is_known_before(peer: Any, model: Any, shared: bool) -> None:
    sliced = peer("_peer_slicegpt")
    counted = sliced.stored(model, 20, shared)
    sliced.slice_to_width(model, BATCHES, 20, shared)
    assert size(model) == counted


@pytest.mark.parametrize("shared", [False, True])
def test_directions_that_nothing_uses_are_cut_without_a_trace(
    peer: Any, model: Any, shared: bool
) -> None:
    """The residual stream of a model that writes 30 dimensions of 48."""
    with torch.no_grad():
        used = torch.linalg.qr(torch.randn(48, 48))[0][:, :30]
        onto = used @ used.mT
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
        for norm in [n for name, n in model.named_modules() if name.endswith("norm")]:
            norm.weight.fill_(1)
        for block in model.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.copy_(onto @ linear.weight)
    before = logits(model)
    peer("_peer_slicegpt").slice_to_width(model, BATCHES, 30, shared)
    assert torch.allclose(logits(model), before, atol=1e-3)


def test_flap_makes_up_for_what_is_constant(peer: Any, model: Any) -> None:
    """Neurons whose values never change go first, and their bias says the same."""
    block = model.model.layers[1].mlp
    constant = [3, 4, 50]

    def hold(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()
        if x.shape[-1] == 80:
            x[..., constant] = 2.0
        return (x,)

    handle = block.down_proj.register_forward_pre_hook(hold)
    before = logits(model)
    flap = peer("_peer_flap")
    module = flap.modules_of(model, attention=False)[1]
    assert module.consumer is block.down_proj
    with flap.hooked([module.consumer.register_forward_pre_hook(module.add)]):
        flap.run(model, BATCHES)
    assert module.scores().argsort()[:3].sort().values.tolist() == constant
    gone = torch.zeros(80, dtype=torch.bool)
    gone[constant] = True
    module.remove(gone)
    handle.remove()
    assert block.down_proj.in_features == 77
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_a_block_that_does_little_goes_first(peer: Any, model: Any) -> None:
    with torch.no_grad():
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            linear.weight.mul_(1e-6)
    before = logits(model)
    short = peer("_peer_shortgpt")
    assert int(short.block_influence(model, BATCHES).argmin()) == 2
    short.shortgpt(model, BATCHES, 0.8)
    assert len(model.model.layers) == 3
    assert torch.allclose(logits(model), before, atol=1e-3)

"""A changed Hugging Face model through `save_pretrained` and `from_pretrained`: the same outputs, the same counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.subjects import holds_exactly_the_live, prepared
from tracker import NeuronEngine, SurgeryError

IDS = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(1))
SHARED: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **SHARED, hidden_size=48, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=4,
        )
    )  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**SHARED, n_embd=32, n_layer=3, n_head=4, n_positions=64))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            **SHARED, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    )  # fmt: skip


def uneven(build: Callable[[], Any], heads: tuple[int, ...]) -> tuple[Any, ...]:
    """A model with trained optimizer state whose MLPs have lost 2, 3 and 4 neurons, and layers so many heads."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = build().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    engine = NeuronEngine()
    engine.track_model(model, "lm", example_inputs={"input_ids": IDS})
    engine.attach_optimizer(optimizer)
    engine.calibrate([{"input_ids": torch.randint(0, 100, (8, 32))}])
    for i, name in enumerate([g.name for g in engine.structure.groups if g.kind == "neuron"]):
        engine.prune_units({name: list(range(i + 2))}, compensate=True)
    names = [g.name for g in engine.structure.groups if g.kind == "head"]
    for name, count in zip(names, heads, strict=True):
        if count:
            engine.prune_units({name: list(range(count))}, compensate=True)
    return model, optimizer, engine


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).eval()(input_ids=IDS).logits
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [(0, 0, 0), (1, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_what_is_saved_is_what_is_loaded(
    build: Callable[[], Any], heads: tuple[int, ...], tmp_path: Path
) -> None:
    from tracker.integrations.pretrained import save_pretrained_uniform

    model, optimizer, engine = uneven(build, heads)
    before, journal = logits(model), len(engine.journal)
    receipt = save_pretrained_uniform(engine, tmp_path)
    assert receipt is not None
    assert receipt.promise == "exact"
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), before, atol=1e-5)
    assert torch.equal(logits(loaded), logits(model))
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    width = {llama: "intermediate_size", gpt2: "n_inner", opt: "ffn_dim"}[build]
    assert getattr(loaded.config, width) == (128 if build is gpt2 else 48) - 2
    if build is llama and all(heads):
        found = loaded.config
        assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (6, 3, 6)
    written = loaded.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(written, model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False))
    holds_exactly_the_live(model, optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()  # and training goes on
    optimizer.step()
    engine.undo()
    assert len(engine.journal) == journal
    assert getattr(model.config, width) == (None if build is gpt2 else 48)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_narrowest_too(tmp_path: Path) -> None:
    from tracker.integrations.pretrained import save_pretrained_uniform

    model, _, engine = uneven(llama, (1, 0, 2))
    count = engine.count_parameters()
    save_pretrained_uniform(engine, tmp_path, shrink=True)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.intermediate_size == 44
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (4, 2)
    assert engine.count_parameters() < count
    assert save_pretrained_uniform(engine, tmp_path) is None  # nothing is left to do


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_no_configuration_says_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    """Dimensions of heads went, a layer was inserted, or code was changed that no shape tells of."""
    from tracker.integrations.pretrained import save_pretrained_uniform

    for act in ("head_dim", "inserted", "code"):
        model, optimizer, engine = uneven(opt, (0, 0, 0))
        if act == "inserted":
            engine.insert_layer(after="model.decoder.layers.0.fc1")
        elif act == "code":
            model.model.decoder.layers[0].activation_fn = nn.Tanh()
        else:
            for name in [g.name for g in engine.structure.groups if g.kind == "head_dim"]:
                engine.prune_units({name: [0]})
        before, state = logits(model), {n: p.shape for n, p in model.named_parameters()}
        config, entries = model.config.to_dict(), len(engine.journal)
        words = "its shapes are right" if act == "code" else "No configuration of OPTConfig"
        with pytest.raises(SurgeryError, match=words):
            save_pretrained_uniform(engine, tmp_path / act)
        assert not (tmp_path / act).exists()
        assert torch.equal(logits(model), before)
        assert state == {n: p.shape for n, p in model.named_parameters()}
        assert model.config.to_dict() == config
        assert len(engine.journal) == entries
        holds_exactly_the_live(model, optimizer)


def test_other_models_are_refused(tmp_path: Path) -> None:
    from tracker.integrations.pretrained import save_pretrained_uniform

    _model, _, engine, _ = prepared("mlp")
    with pytest.raises(SurgeryError, match="apply_journal"):
        save_pretrained_uniform(engine, tmp_path)


# Without transformers.


@pytest.mark.parametrize("shrink", [False, True])
def test_blocks_become_equally_wide(shrink: bool) -> None:
    model, optimizer, engine, x = prepared("residual")
    engine.calibrate([x])
    hidden = [f"blocks.{i}.1" for i in range(3)]
    for i, name in enumerate(hidden):
        engine.prune_neurons({name: list(range(2 * i + 1))})
    before, entries = model(x).detach(), len(engine.journal)
    widths = [model.blocks[i][1].out_features for i in range(3)]
    assert widths == [23, 21, 19]
    ids = engine.track_model(model)
    tried = engine.uniform_widths(shrink=shrink, dry_run=True)
    assert tried is not None
    assert tried.dry_run
    assert [model.blocks[i][1].out_features for i in range(3)] == widths
    receipt = engine.uniform_widths(shrink=shrink)
    assert receipt is not None
    assert [model.blocks[i][1].out_features for i in range(3)] == [19 if shrink else 23] * 3
    assert model.stem.out_features == 12  # of no numbered block
    if not shrink:
        assert receipt.promise == "exact"
        assert torch.allclose(model(x), before, atol=1e-5)
    assert engine.uniform_widths() is None
    holds_exactly_the_live(model, optimizer)
    engine.undo()
    assert [model.blocks[i][1].out_features for i in range(3)] == widths
    assert engine.track_model(model) == ids
    assert len(engine.journal) == entries
    assert torch.equal(model(x), before)


def test_layers_one_behind_the_other_are_of_no_kind() -> None:
    model, _, engine, _ = prepared("mlp")
    assert engine.uniform_widths() is None
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [12, 9, 4]


def test_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two cannot grow: the first is as before too."""
    from tracker.parts import surgeon

    model, _, engine, x = prepared("residual")
    for i in (1, 2):
        engine.prune_neurons({f"blocks.{i}.1": list(range(i))}, compensate=False)
    before, entries, real = model(x).detach(), len(engine.journal), surgeon.plan_width
    calls: list[object] = []

    def sometimes(tracker: Any, key: Any, *rest: Any) -> Any:
        calls.append(key)
        if len(calls) == 2:
            raise SurgeryError("not this one")
        return real(tracker, key, *rest)

    monkeypatch.setattr(surgeon, "plan_width", sometimes)
    with pytest.raises(SurgeryError, match="not this one"):
        engine.uniform_widths()
    assert len(calls) == 2
    assert torch.equal(model(x), before)
    assert len(engine.journal) == entries
    model.train()
    engine.undo()  # of what was before
    assert len(engine.journal) == entries - 1


def test_a_model_that_nobody_ran_gives_its_hidden_states_once() -> None:
    """transformers registers the hooks that gather them in a model's first pass."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = llama().eval()
    engine = NeuronEngine()
    asked = {"input_ids": IDS, "output_hidden_states": True}
    engine.track_model(model, "m", example_inputs=asked)
    assert engine.structure.groups
    out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1

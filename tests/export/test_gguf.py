"""GGUF: each tensor is of the shape that the metadata says, and whoever runs the file gets the model's own logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.llamas import IDS, llama, make_uneven, tracked
from tracker import ExportError, NeuronEngine, VerificationError
from tracker.export import llama_like, to_gguf
from tracker.export.gguf_reference import GgufModel

pytestmark = pytest.mark.filterwarnings("ignore")
gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def uneven() -> tuple[Any, NeuronEngine]:
    """A llama whose layers have 4, 3 and 2 heads of keys, and 48, 47 and 46 neurons."""
    model = llama()
    engine = tracked(model)
    make_uneven(engine)
    return model, engine


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What llama.cpp says is asked for in one slow test."""
    monkeypatch.setattr("tracker.export.gguf.llama_cpp_logits", lambda *_: None)


def rows(path: Path) -> list[np.ndarray[Any, Any]]:
    model = GgufModel(path)
    return [model.logits(ids.numpy()) for ids in IDS]


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize(("dtype", "rounding"), [("f32", 1e-5), ("f16", 5e-3), ("q8_0", 5e-2)])
def test_the_file_says_what_the_model_does(
    dtype: str, rounding: float, uneven: tuple[Any, NeuronEngine], tmp_path: Path
) -> None:
    model, engine = uneven
    report = to_gguf(engine, tmp_path / "model.gguf", dtype=dtype)
    assert report.output_difference is not None
    assert report.output_difference < rounding
    fields = {k: f.contents() for k, f in gguf.GGUFReader(report.path).fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [8, 6, 4]
    assert fields["deci.attention.head_count_kv"] == [4, 3, 2]
    assert fields["deci.feed_forward_length"] == ([64] * 3 if dtype == "q8_0" else [48, 47, 46])
    expected = model(IDS).logits.detach().numpy()
    for found, logits in zip(rows(report.path), expected, strict=True):
        assert np.abs(found - logits).max() <= rounding * np.abs(logits).max()


@pytest.mark.usefixtures("without_llama_cpp")
def test_a_narrower_mlp_is_as_small_in_8_bits_as_any(tmp_path: Path) -> None:
    """Rows of 47 weights could not be rounded by themselves; with zeros behind them they can, and nothing differs."""
    model = llama(mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.bias += torch.randn_like(part.bias)
    engine = tracked(model)
    engine.prune_units({g.name: [0] for g in engine.structure.groups if "gate_proj" in g.layers[0]})
    report = to_gguf(engine, tmp_path / "model.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors}
    assert {kinds[f"blk.{i}.ffn_{part}.weight"] for i in range(3) for part in ("up", "down")} == {
        "Q8_0"
    }
    assert "51 neurons of zeros, to multiples of 32 for each MLP" in report.notes


@pytest.mark.usefixtures("without_llama_cpp")
def test_even_layers_are_a_plain_llama(tmp_path: Path) -> None:
    """Tied embeddings, other frequencies (those of Llama 3), biases."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = llama(tie_word_embeddings=True, rope_parameters=rope, attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    report = to_gguf(tracked(model), tmp_path / "model.gguf", dtype="f32")
    assert report.output_difference is not None
    assert report.output_difference < 1e-5
    reader = gguf.GGUFReader(report.path)
    names = {t.name for t in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "llama"
    assert {"rope_freqs.weight", "blk.0.attn_q.bias"} <= names
    assert "output.weight" not in names


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize("wrong", ["order", "metadata"])
def test_a_wrong_file_is_not_kept(
    wrong: str, uneven: tuple[Any, NeuronEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries in the order of transformers; and a head more than the tensors have."""
    (tmp_path / "model.gguf").write_text("before")
    error: type[Exception] = VerificationError
    if wrong == "order":
        monkeypatch.setattr(llama_like, "interleaved", lambda rows, _: rows)
    else:
        error = ExportError
        add = gguf.GGUFWriter.add_feed_forward_length
        monkeypatch.setattr(
            gguf.GGUFWriter, "add_feed_forward_length", lambda w, n: add(w, [n[0], *n[:-1]])
        )
    with pytest.raises(error):
        to_gguf(uneven[1], tmp_path / "model.gguf")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["before"]


def test_what_no_file_can_say_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = llama(num_hidden_layers=2)
    engine = tracked(model)
    engine.insert_layer(after="model.layers.1.mlp.up_proj")
    with pytest.raises(ExportError, match=r"Layer 1 has Sequential as its mlp\.up_proj"):
        to_gguf(engine, tmp_path / "model.gguf")
    engine.undo()
    model.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(ExportError, match="scales its scores"):
        to_gguf(engine, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="dtype is one of f32, f16, q8_0"):
        to_gguf(engine, tmp_path / "model.gguf", dtype="q4_k")
    other = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ExportError, match="GPT2LMHeadModel cannot be written as GGUF"):
        to_gguf(tracked(other), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"self-modifying-slm\[gguf\]"):
        to_gguf(engine, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def byte_pairs() -> Any:
    """A tokenizer of bytes and a few merges, which splits texts as SmolLM's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    letters += [c for c in "Ġehlot" if c not in letters]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t")]
    tokens = ["<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    model = models.BPE(vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges=merges)
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@pytest.mark.usefixtures("without_llama_cpp")
def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    model = llama(vocab_size=112)
    report = to_gguf(tracked(model), tmp_path / "model.gguf", tokenizer)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(report.path).fields.items()}
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert len(fields["tokenizer.ggml.tokens"]) == 112
    assert fields["tokenizer.ggml.tokens"][tokenizer.eos_token_id] == "</s>"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert "he ll" in fields["tokenizer.ggml.merges"]


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ExportError, match="and the model's embedding 96 rows"):
        to_gguf(tracked(model), tmp_path / "model.gguf", byte_pairs())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_llama_cpp_gives_the_same_logits_and_words(dtype: str, tmp_path: Path) -> None:
    """With layers of unequal sizes, and a tokenizer; by a target of the Makefile, since it is built from source."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = llama(vocab_size=112), byte_pairs()
    engine = tracked(model)
    make_uneven(engine)
    report = to_gguf(engine, tmp_path / "model.gguf", tokenizer, dtype)
    assert report.checked_with == "llama.cpp and numpy"
    assert report.output_difference is not None
    assert report.output_difference < (5e-2 if dtype == "q8_0" else 5e-3)
    run = llama_cpp.Llama(str(report.path), n_ctx=64, verbose=False)
    text = "hello the 123"
    ids = run.tokenize(text.encode(), add_bos=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    if dtype == "q8_0":  # what is rounded may choose other words
        return
    for prompt in IDS[:, :6]:
        found: list[int] = []
        for token in run.generate(prompt.tolist(), temp=0.0, repeat_penalty=1.0, reset=True):
            found.append(token)
            if len(found) == 8:
                break
        words = model.generate(
            prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert words[0, 6:].tolist() == found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2", "Mistral"])
def test_others_that_are_built_like_llama(name: str, tmp_path: Path) -> None:
    """Qwen2 has biases of queries, keys and values: they are rotated with their rows."""
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, head_dim=8)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    engine = tracked(model)
    make_uneven(engine)
    report = to_gguf(engine, tmp_path / "model.gguf", dtype="f32")
    assert report.output_difference is not None
    assert report.output_difference < 2e-3
    logits = model(IDS).logits.detach().numpy()
    for found, expected in zip(rows(report.path), logits, strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

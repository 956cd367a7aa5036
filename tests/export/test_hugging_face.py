"""A directory that transformers loads where this library is not: the same logits, the same words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.llamas import IDS, llama, make_uneven, tracked
from tracker import ExportError
from tracker.export import to_gguf, to_hugging_face

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def words(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS[:1, :4], max_new_tokens=8, do_sample=False)
    return found


def loads_elsewhere(model: Any, path: Path, tmp_path: Path, kind: str) -> None:
    """It loads in a process that cannot import this library, with equal logits, and cached words equal to others."""
    with torch.no_grad():
        torch.save((IDS, model(IDS).logits, words(model)), tmp_path / "values")
    code = (
        "import sys; sys.modules['tracker'] = None\n"
        "import torch\n"
        f"from transformers import {kind} as kind\n"
        f"model = kind.from_pretrained({str(path)!r}, trust_remote_code=True)\n"
        f"ids, logits, words = torch.load({str(tmp_path / 'values')!r})\n"
        "assert torch.equal(model(ids).logits, logits)\n"
        "for cache in (True, False):\n"
        "    found = model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False, use_cache=cache)\n"
        "    assert torch.equal(found, words)\n"
        "model(ids, labels=ids).loss.backward()\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow
def test_layers_of_unequal_widths_load_without_this_library(tmp_path: Path) -> None:
    model = llama()
    engine = tracked(model)
    make_uneven(engine)
    heads = [b.self_attn.k_proj.out_features // 4 for b in model.model.layers]
    assert heads == [4, 3, 2]
    report = to_hugging_face(engine, tmp_path / "out")
    assert report.output_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["uneven"]["shapes"]["model.layers.2.mlp.gate_proj.weight"] == [46, 32]
    assert "tracker" not in (tmp_path / "out" / "modeling_uneven.py").read_text()
    loads_elsewhere(model, tmp_path / "out", tmp_path, "AutoModelForCausalLM")


@pytest.mark.slow
def test_blocks_that_were_copied_and_removed(tmp_path: Path) -> None:
    """With tied embeddings, and a narrower stream."""
    model = llama(tie_word_embeddings=True)
    engine = tracked(model)
    engine.insert_layer(after="model.layers.0")
    engine.remove_layer("model.layers.2", force=True)
    make_uneven(engine, ("neuron",))
    engine.prune_units({g.name: [3] for g in engine.structure.groups if g.kind == "residual"})
    report = to_hugging_face(engine, tmp_path / "out")
    assert report.output_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    loads_elsewhere(model, tmp_path / "out", tmp_path, "AutoModelForCausalLM")


def test_even_layers_need_no_code_of_their_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(hidden_size=24)  # a configuration wants a multiple of the heads
    engine = tracked(model)
    for kind, gone in (("neuron", [0, 5]), ("head", [1])):
        groups = [g.name for g in engine.structure.groups if g.kind == kind]
        engine.prune_units(dict.fromkeys(groups, gone), verify=False)
    before = model.config.to_dict()
    to_hugging_face(engine, tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_uneven.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.config.intermediate_size, loaded.config.num_key_value_heads) == (46, 3)
    assert model.config.to_dict() == before


def test_what_no_class_makes_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = llama()
    engine = tracked(model)
    engine.insert_layer(after="model.layers.0.mlp.down_proj")
    with pytest.raises(ExportError, match=r"At 'model\.layers\.0\.mlp\.down_proj"):
        to_hugging_face(engine, tmp_path / "out")
    engine.undo()
    model.lm_head.weight = model.model.embed_tokens.weight  # the configuration says otherwise
    with pytest.raises(ExportError, match="tie_word_embeddings"):
        to_hugging_face(tracked(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ExportError, match="no earlier export"):
        to_hugging_face(tracked(model), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


def test_other_models_are_sent_elsewhere(tmp_path: Path) -> None:
    from tests.export.test_plain import changed

    _model, engine, _ = changed("unchanged")
    with pytest.raises(ExportError, match="no model of transformers"):
        to_hugging_face(engine, tmp_path / "out")


def test_a_model_that_was_read_from_a_gguf_file_is_written(tmp_path: Path) -> None:
    """Its weights are ordinary ones; transformers calls it quantized, and would not save it."""
    pytest.importorskip("gguf")
    from transformers import LlamaForCausalLM

    from tests.export.test_gguf import byte_pairs

    made = llama(vocab_size=112)
    to_gguf(tracked(made), tmp_path / "a.gguf", byte_pairs(), "f32", verify=False)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    engine = tracked(model.eval())
    make_uneven(engine)
    to_hugging_face(engine, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert model.config.quantization_config.quant_method == "gguf"  # it is as it was

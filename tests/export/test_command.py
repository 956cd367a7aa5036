"""python -m tracker export: a checkpoint becomes a file that other tools take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.export import subjects
from tests.export.llamas import llama, make_uneven, tracked
from tracker import NeuronEngine
from tracker.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = subjects.mlp()
    engine = NeuronEngine()
    engine.track_model(model, "mlp", example_inputs=torch.randn(4, 6))
    engine.attach_optimizer(torch.optim.Adam(model.parameters()))
    engine.prune_neurons({"0": [1, 2]})
    engine.insert_layer(after="2")
    return engine.save_checkpoint(tmp_path / "run")


def test_to_onnx(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    built = ["--model", "tests.export.subjects:mlp"]
    assert main(["export", str(run), "--to", "onnx", *built]) == 0
    assert run.with_name("run.onnx").is_file()
    assert "checked with onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "A checkpoint holds no code"),
        (["--model", "tests.export.subjects:mlp", "--config", "x"], "A checkpoint holds no code"),
        (["--model", "tests.export.subjects:nothing"], "gives no model (AttributeError"),
        (["--model", "tests.export.subjects:torch"], "gives no model"),
        (["--model", "builtins:dict"], "gives a dict, and no nn.Module"),
        (["--model", "tests.export.subjects:conv"], "does not fit this model"),
        (["--config", "nowhere"], "builds no model of transformers"),
    ],
)
def test_what_cannot_be_built_is_told(
    options: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--config" in options and "--model" not in options:
        pytest.importorskip("transformers")
    before = sorted(p.name for p in run.parent.iterdir())
    assert main(["export", str(run), "--to", "onnx", *options]) == 1
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in run.parent.iterdir()) == before


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_of_transformers(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    monkeypatch.setattr("tracker.export.gguf.llama_cpp_logits", lambda *_: None)
    model = llama(num_hidden_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    engine = tracked(model)
    make_uneven(engine, ("neuron",))
    engine.save_checkpoint(tmp_path / "run")
    asked = ["export", str(tmp_path / "run"), "--to", to, "--config", str(tmp_path)]
    assert main([*asked, "--output", str(tmp_path / "out")]) == 0
    assert "outputs differ by" in capsys.readouterr().out
    assert (tmp_path / "out").exists()

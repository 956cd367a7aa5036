"""ONNX: what onnxruntime answers is what the model in memory answers, tracked or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.export.test_plain import changed
from tracker import ExportError, NeuronEngine, VerificationError
from tracker.export import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def answers(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    arrays = [x.numpy() for x in inputs]
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


@pytest.mark.parametrize("case", ["inserted", pytest.param("masks", marks=pytest.mark.slow)])
def test_the_file_answers_what_the_model_does(case: str, tmp_path: Path) -> None:
    model, engine, x = changed(case)  # it is tracked meanwhile
    model.train()
    report = to_onnx(engine, tmp_path / "model.onnx")
    assert model.training
    assert report.output_difference is not None
    assert report.output_difference < 1e-5
    assert report.checked_with == "onnxruntime"
    expected = model.eval()(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(answers(report.path, x), expected, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_other_sizes_where_they_are_asked_for(tmp_path: Path) -> None:
    model, engine, x = changed("activation gone")
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    report = to_onnx(engine, tmp_path / "model.onnx", dynamic_shapes=sizes)
    assert torch.allclose(answers(report.path, x[:7]), model(x[:7]), atol=1e-5)


def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model, engine, _ = changed("inserted")
    goal = tmp_path / "model.onnx"
    goal.write_text("before")
    write = torch.onnx.export

    def other(bench: torch.nn.Module, *args: object, **options: object) -> object:
        bench[0].weight = torch.nn.Parameter(bench[0].weight * 2)  # type: ignore[index, operator]
        return write(bench, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", other)
    with pytest.raises(VerificationError, match="run by onnxruntime"):
        to_onnx(engine, goal)
    assert goal.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)

    model, engine = Sum(), NeuronEngine()
    engine.track_model(model, "sum", example_inputs=torch.randn(4, 6))
    with pytest.raises(ExportError, match=r"torch\.onnx\.export cannot export Sum"):
        to_onnx(engine, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model, engine, _ = changed("unchanged")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"self-modifying-slm\[onnx\]"):
        to_onnx(engine, tmp_path / "model.onnx")

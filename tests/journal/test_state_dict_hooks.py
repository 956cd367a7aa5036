"""Plain `state_dict` and `load_state_dict`, and the frameworks that call them, with a journal on board."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoint.runs import CHANGES, begun, fresh
from tests.surgery.subjects import equal, snapshot, train
from tracker import CheckpointError, NeuronEngine
from tracker.journal.state_dict_hooks import KEY


def changed(name: str) -> tuple[Any, ...]:
    model, opt, engine, x = begun(name)
    engine.carry_journal()
    engine.carry_journal()
    assert KEY not in model.state_dict()
    for change in CHANGES.values():
        change(engine)
        train(model, opt, x)
    return model, opt, engine, x


def waiting(name: str) -> tuple[Any, ...]:
    model, opt, x = fresh(name, "Adam")
    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs=x)
    engine.attach_optimizer(opt)
    engine.carry_journal()
    return model, opt, engine, x


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("route", ["torch", "safetensors", "inside another"])
def test_a_plain_load_resumes_bit_for_bit(name: str, route: str, tmp_path: Path) -> None:
    model, opt, engine, x = changed(name)
    other, other_opt, resumed, _ = waiting(name)
    state: Any = model.state_dict()
    if route == "torch":
        torch.save([state, opt.state_dict()], tmp_path / "file")
        state, moments = torch.load(tmp_path / "file", weights_only=True)
    else:
        moments = copy.deepcopy(opt.state_dict())
        save_file(state, tmp_path / "file")
        state = load_file(tmp_path / "file")
    if route == "inside another":
        nn.ModuleDict({"inner": other}).load_state_dict({f"inner.{k}": v for k, v in state.items()})
    else:
        other.load_state_dict(state)
    other_opt.load_state_dict(moments)
    assert str(other) == str(model)
    assert resumed.track_model(other) == engine.track_model(model)
    assert resumed.journal.to_dict() == engine.journal.to_dict()
    assert any("slot_age" in s for s in opt.state.values())
    for _ in range(3):
        assert train(model, opt, x) == train(other, other_opt, x)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    resumed.prune_neurons({"0": [2]})
    train(other, other_opt, x)
    other.load_state_dict(other.state_dict())  # the same journal again: nothing to do


def test_what_does_not_lead_on_is_refused() -> None:
    model, _, _, _ = changed("mlp")
    state = model.state_dict()
    other, opt, x = fresh("mlp", "Adam")
    for carries in (False, True):  # the second engine does not know how the model was at first
        engine = NeuronEngine()
        engine.track_model(other, example_inputs=x)
        engine.attach_optimizer(opt)
        if carries:
            engine.carry_journal()
        engine.prune_neurons({"2": [0]})
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="at first"):
        other.load_state_dict(state)
    conv, *_ = waiting("conv")
    with pytest.raises(CheckpointError, match="does not fit"):
        conv.load_state_dict(state)
    other_model, *_ = waiting("mlp")
    with pytest.raises(CheckpointError, match="by its journal"):
        other_model.load_state_dict({**state, "0.weight": torch.zeros(3, 3)})
    for bad in (
        torch.zeros(3),
        torch.zeros(3).byte(),
        "journal",
        torch.tensor([91] * 10**6).byte(),
    ):
        with pytest.raises(CheckpointError, match="journal"):
            other_model.load_state_dict({**state, KEY: bad})
    assert equal(dict(other.state_dict()), before)
    assert train(other, opt, x) > 0


def forged(state: Any, change: Any) -> Any:
    """A state dict with a journal that was changed by hand."""
    journal = json.loads(bytes(state[KEY].numpy()))
    change(journal["entries"])
    return {
        **state,
        KEY: torch.frombuffer(bytearray(json.dumps(journal).encode()), dtype=torch.uint8),
    }


TORN: dict[str, Any] = {
    "a tensor too few": lambda s: {k: v for k, v in s.items() if k != "2.bias"},
    "a tensor too many": lambda s: {**s, "more": torch.zeros(1)},
    "a tensor of text": lambda s: {**s, "2.bias": "x"},
    "an unknown layer": lambda s: forged(s, lambda e: e[-1].update(layers={"nowhere": [[0, 3]]})),
    "a layer that is shorter": lambda s: forged(
        s, lambda e: e[3].update(layers={"0": [[0, 4000]]})
    ),
    "millions of ids": lambda s: forged(s, lambda e: e[3].update(layers={"0": [[-1, 2**24]]})),
}


@pytest.mark.parametrize("kind", TORN)
def test_what_cannot_be_loaded_changes_nothing(kind: str) -> None:
    model, *_ = changed("mlp")
    other, opt, engine, x = waiting("mlp")
    before, ids = snapshot(other, opt), copy.deepcopy(engine.track_model(other))
    with pytest.raises(CheckpointError):
        other.load_state_dict(TORN[kind](model.state_dict()))
    assert equal(snapshot(other, opt), before)
    assert engine.track_model(other) == ids
    assert not len(engine.journal)
    engine.prune_neurons({"0": [0]})
    assert train(other, opt, x) > 0


def test_a_copy_carries_nothing() -> None:
    model, _, _, x = changed("mlp")
    copied = copy.deepcopy(model)
    assert KEY not in copied.state_dict()
    assert torch.equal(copied(x), model(x))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    data = torch.utils.data.DataLoader(torch.randn(32, 6), batch_size=8)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.engine, self.losses = small(), NeuronEngine(), list[float]()
            self.engine.track_model(self.net, "net", example_inputs=torch.randn(4, 6))
            self.engine.carry_journal()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
            self.engine.attach_optimizer(optimizer)
            return optimizer

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(batch).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                self.engine.prune_neurons({"0": [0, 3]})

    def fit(module: Any, epochs: int, path: Any = None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=path)
        return trainer

    whole, first, second = Module(), Module(), Module()
    fit(whole, 3)
    fit(first, 2).save_checkpoint(tmp_path / "run.ckpt")
    fit(second, 3, tmp_path / "run.ckpt")
    assert second.net[0].out_features == 10
    assert second.losses == whole.losses[8:]
    assert (
        equal(dict(second.net.state_dict()), dict(whole.net.state_dict()))
        or len(second.engine.journal) == 1
    )


@pytest.mark.filterwarnings("ignore")
def test_accelerate_resumes(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = small()
        engine = NeuronEngine()
        engine.track_model(model, "net", example_inputs=torch.ones(4, 6))
        engine.carry_journal()
        model, opt = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
        engine.attach_optimizer(opt)
        return accelerator, model, opt, engine

    torch.manual_seed(1)
    x = torch.randn(32, 6)
    accelerator, model, opt, engine = prepared()
    train(model, opt, x)
    engine.prune_neurons({"0": [0, 3]})
    engine.expand_layer("0", 1)
    train(model, opt, x)
    accelerator.save_state(str(tmp_path / "run"))
    other_accelerator, other, other_opt, resumed = prepared()
    other_accelerator.load_state(str(tmp_path / "run"))
    for _ in range(3):
        assert train(model, opt, x) == train(other, other_opt, x)
    assert resumed.track_model(other) == engine.track_model(model)


class Judged(nn.Module):
    """What a Trainer of transformers takes: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.net(x)
        return {"loss": y.square().mean(), "logits": y}


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_transformers_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": row} for row in torch.randn(32, 6, generator=torch.Generator().manual_seed(1))]

    class Prune(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self, engine: NeuronEngine) -> None:
            self.engine = engine

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            self.engine.attach_optimizer(parts["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == 2:
                self.engine.prune_neurons({"net.0": [0, 3]})
                self.engine.expand_layer("net.0", 1)

    def run(folder: str, path: Any = None) -> tuple[Any, ...]:
        model, engine = Judged(), NeuronEngine()
        engine.track_model(model, "judged", example_inputs=torch.ones(4, 6))
        engine.carry_journal()
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, callbacks=[Prune(engine)]
        )
        trainer.train(resume_from_checkpoint=path)
        return model, engine

    model, engine = run("whole")
    other, resumed = run("again", str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    assert resumed.track_model(other) == engine.track_model(model)

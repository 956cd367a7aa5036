"""The callbacks, against the real frameworks; loggers, by what they can do."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.surgery.subjects import holds_exactly_the_live, prepared
from tracker import NeuronEngine, Policy, StatisticsError
from tracker.integrations import log_to, numbers

QUICK = Policy(
    warm_up=4, every=8, look=3, settle=3, floor=2, tolerance=0.05, grow=True, plateau=1.0, regret=9.0,
    max_parameters=2_000,
)  # fmt: skip


class Scalars:
    """As much of a SummaryWriter as is used."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, int]] = {}
        self.figures: list[str] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen[name] = value, step

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        self.figures.append(name)


class Dicts:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def log(self, values: dict[str, float]) -> None:
        self.seen.update(values)


def test_loggers_by_what_they_can_do() -> None:
    model, _, engine, x = prepared("mlp")
    engine.start_tracking()
    model(x)
    engine.stop_tracking()
    values = numbers(engine)
    assert values["tracker/parameters"] == sum(p.numel() for p in model.parameters())
    assert values["tracker/neurons/0"] == model[0].out_features
    assert 0 <= values["tracker/dead/0"] <= 1
    assert all(math.isfinite(v) for v in values.values())
    scalars, dicts = Scalars(), Dicts()
    log_to(scalars, engine, 7)
    log_to(dicts, engine, 7)
    assert scalars.seen == {name: (value, 7) for name, value in values.items()}
    assert dicts.seen == {**values, "step": 7}
    assert not scalars.figures
    with pytest.raises(StatisticsError, match="no logger"):
        log_to(object(), engine, 7)


def test_tensorboard_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    _model, _, engine, _ = prepared("mlp")
    with SummaryWriter(str(tmp_path)) as writer:
        log_to(writer, engine, 1)
    assert list(tmp_path.glob("events*"))


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, tracker, tracker.integrations; print({'lightning', 'transformers'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from tracker.integrations.lightning import SelfModificationCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (self(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Module()
    data = torch.utils.data.TensorDataset(torch.randn(256, 6), torch.randn(256, 3))
    callback = SelfModificationCallback(QUICK)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, 8))
    assert callback.engine.trainer.run.steps == trainer.global_step == 96 // accumulate
    assert len(callback.engine.journal) > 0
    assert callback.engine.life[-1].parameters == sum(p.numel() for p in module.parameters())
    holds_exactly_the_live(module, trainer.optimizers[0])
    # Without a policy, the default one is fitted to the steps that the trainer takes.
    callback = SelfModificationCallback()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, 8))
    assert callback.engine.trainer.run.policy == Policy.over(trainer.global_step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tracker.integrations.transformers import SelfModificationCallback

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=50,
        )
    )  # fmt: skip
    rows = [{"input_ids": (ids := torch.randint(0, 50, (9,))), "labels": ids} for _ in range(96)]
    callback = SelfModificationCallback(QUICK)
    before = sum(p.numel() for p in model.parameters())
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, gradient_accumulation_steps=2,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=rows,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.engine.trainer.run.steps == trainer.state.global_step == 24
    assert len(callback.engine.journal) > 0
    assert sum(p.numel() for p in model.parameters()) != before
    assert not math.isnan(callback.engine.life[-1].loss)
    fitted = SelfModificationCallback()
    trainer.remove_callback(callback)
    trainer.add_callback(fitted)
    trainer.train()
    assert fitted.engine.trainer.run.policy == Policy.over(24)
    assert (
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape[1] == 7
    )


def test_an_engine_can_be_shared() -> None:
    model, _, engine, _ = prepared("mlp")
    assert isinstance(engine, NeuronEngine)
    assert engine.count_parameters() == sum(p.numel() for p in model.parameters())

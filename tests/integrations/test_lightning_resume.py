"""Lightning resumes by the callback alone: a run that was interrupted equals one that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations.runs import POLICIES, changes, same
from tracker import SurgeryError

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")

from tracker.integrations.lightning import SelfModificationCallback  # noqa: E402


class Net(lightning.LightningModule):
    """A dropout draws random numbers; optimizer state has moments."""

    jump = 0.0  # of the loss after each change, by which its gradient does not change

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = (self(batch[0]) - batch[1]).square().mean()
        if self.global_step % 6 >= 3:
            return loss
        return loss * 5.0 + self.jump  # it rises after each change

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data() -> Any:
    g = torch.Generator().manual_seed(1)
    rows = torch.utils.data.TensorDataset(
        torch.randn(64, 6, generator=g), torch.randn(64, 3, generator=g)
    )
    return torch.utils.data.DataLoader(rows, 8, shuffle=True)


class Epochs(lightning.Callback):
    """Saves a checkpoint at the end of each epoch, and one in the middle of the second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 13:
            trainer.save_checkpoint(self.folder / "13.ckpt")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def trained_by(folder: Path, *callbacks: Any) -> Any:
    return lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def fit(policy: Any, folder: Path, *more: Any, path: Any = None, loader: Any = None) -> Any:
    torch.manual_seed(3)
    module, callback = Net(), SelfModificationCallback(policy)
    trainer = trained_by(folder, callback, *more)
    trainer.fit(module, loader or data(), ckpt_path=path)
    return module, callback.engine, trainer.optimizers[0]


@pytest.mark.parametrize("name", ["shrink", "grow", "regret inserting"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "regret inserting":  # an exact change goes only where the loss is no number any more
        monkeypatch.setattr(Net, "jump", float("inf"))
    whole = fit(POLICIES[name], tmp_path, Epochs(tmp_path))
    assert len(whole[1].life) > 3
    assert ("undone" in [d.what for d in whole[1].life]) is (name == "regret inserting")
    for step in (8, 16):
        same(whole, fit(POLICIES[name], tmp_path, path=tmp_path / f"{step}.ckpt"))


class Resumable(torch.utils.data.DataLoader):
    """Goes on in the middle of an epoch, as Lightning asks for."""

    begin = 0

    def state_dict(self) -> dict[str, int]:
        return {"begin": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["begin"]

    def __iter__(self) -> Any:
        first, self.begin = self.begin, 0
        for self.at, batch in enumerate(super().__iter__(), start=1):
            if self.at > first:
                yield batch


def test_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole = fit(POLICIES["shrink"], tmp_path, Epochs(tmp_path), loader=Resumable(data().dataset, 8))
    path = tmp_path / "13.ckpt"
    again = fit(POLICIES["shrink"], tmp_path, path=path, loader=Resumable(data().dataset, 8))
    same(whole, again)


def test_a_checkpoint_is_loaded_without_a_trainer(tmp_path: Path) -> None:
    module, engine, _ = fit(POLICIES["shrink"], tmp_path, Epochs(tmp_path))
    loaded = Net.load_from_checkpoint(tmp_path / "24.ckpt")
    x = torch.randn(4, 6)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.hparams == {"width": 16}
    # And trained on, saved and loaded once more.
    callback = SelfModificationCallback(POLICIES["shrink"])
    trainer = trained_by(tmp_path, callback)
    trainer.fit(loaded.train(), data())
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    assert changes(callback.engine)[: len(engine.journal)] == changes(engine)
    more = Net.load_from_checkpoint(tmp_path / "more.ckpt")
    assert torch.equal(more.eval()(x), loaded.eval()(x))
    # Evaluation by a trainer loads it, too.
    trained_by(tmp_path, SelfModificationCallback()).validate(
        Net(), data(), ckpt_path=tmp_path / "24.ckpt"
    )


class Scattered(Net):
    forward = lightning.LightningModule.forward

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


class Inner(Net):
    """Calls the network in it, and has no forward of its own."""

    forward = lightning.LightningModule.forward

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


class Around(Net):
    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def test_what_cannot_be_watched_is_told_at_once(tmp_path: Path) -> None:
    for module, why in (
        (torch.compile(Net(), backend="eager"), "Compile the network in it"),
        (Scattered(), "has no forward"),
        (Around(), "does not call the module itself"),
    ):
        with pytest.raises(SurgeryError, match=why):
            trained_by(tmp_path, SelfModificationCallback()).fit(module, data())
    example = Around()
    example.example_input_array = torch.ones(2, 6)
    compiled = Net()
    compiled.net.compile(backend="eager")
    for module in (Inner(), example, compiled):
        callback = SelfModificationCallback(POLICIES["shrink"])
        trained_by(tmp_path, callback).fit(module, data())
        assert len(callback.engine.journal) > 0

"""Lightning: a network that changes itself, stopped after an epoch, resumed, tested and loaded for use."""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tracker.integrations.lightning import SelfModificationCallback


class Classifier(LightningModule):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)
        )

    def training_step(self, batch, index):
        """The loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, index):
        """The share of a batch that is right."""
        x, y = batch
        self.log("right", (self.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        """One, with a schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), 5e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


seed_everything(0, verbose=False)
x = torch.randn(1024, 8)
y = x[:, :3].abs().argmax(1)
data = DataLoader(TensorDataset(x, y), 16)
folder = tempfile.mkdtemp()
quiet = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

first = Trainer(
    max_epochs=3,
    callbacks=[SelfModificationCallback(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
    **quiet,
)
module = Classifier()
first.fit(module, data)
widths = [m.out_features for m in module.network if isinstance(m, nn.Linear)]
print("after three epochs:", widths)
assert widths != [48, 48, 3]

callback = SelfModificationCallback()
again = Classifier()  # by the same code, at its original sizes
second = Trainer(max_epochs=4, callbacks=[callback], enable_checkpointing=False, **quiet)
second.fit(again, data, ckpt_path=first.checkpoint_callback.best_model_path)
print(callback.engine.journal)
assert second.current_epoch == 4
told = second.test(again, data, verbose=False)
print(told)
assert told[0]["right"] > 0.8

second.save_checkpoint(f"{folder}/last.ckpt")
loaded = Classifier.load_from_checkpoint(f"{folder}/last.ckpt")
assert torch.equal(loaded.network(x), again.network(x))

"""Deployment: a trained model is made smaller, checked on held-back data, and leaves as files that need no tracker."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tracker import NeuronEngine, apply_journal
from tracker.export import to_plain


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return float((network(x[1500:]).argmax(1) == y[1500:]).float().mean())


model = build()
x = torch.randn(2000, 20)
y = (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0).long()
loader = DataLoader(TensorDataset(x[:1500], y[:1500]), 100, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(20):
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
model.eval()
before = accuracy(model)

engine = NeuronEngine()
engine.track_model(model, "to deploy", example_inputs=x[:16])


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


print(engine.calibrate(loader, loss=loss))
print(engine.compress(keep=0.4, batches=loader, loss=loss, dry_run=True))  # what would it cost?
receipt = engine.compress(keep=0.4, batches=loader, loss=loss, protect=[model[4]])
print(receipt)
after = accuracy(model)
print(f"right on data that nothing has seen: {before:.1%} before, {after:.1%} after")
assert after > before - 0.05
assert receipt.parameters_after <= 0.42 * receipt.parameters_before

folder = Path(tempfile.mkdtemp())
plain = to_plain(engine)  # ordinary modules, no hooks
torch.save(plain, folder / "plain.pt")
served = torch.load(folder / "plain.pt", weights_only=False)
program = torch.export.export(served, (x[:16],)).module()
assert torch.equal(served(x), model(x))
assert torch.allclose(program(x[:16]), model(x[:16]), atol=1e-6)

engine.save_checkpoint(folder / "run")
assert torch.equal(apply_journal(build(), folder / "run")(x), model(x))  # the original code

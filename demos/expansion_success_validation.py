"""Validation: growth preserves the function, gives fresh ids, and what is new learns."""

import torch
from _checks import Checks
from _common import quick
from torch import nn

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed, train_epoch
from tracker import NeuronEngine

set_seed(0)
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(2_000))
model = FashionMLP([32, 16])
optimizer = torch.optim.Adam(model.parameters())
train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, progress=False)
model.eval()
images = torch.cat([x for x, _ in test])
engine = NeuronEngine()
ids = {name: list(of) for name, of in engine.track_model(model, "m", images[:16]).items()}
engine.attach_optimizer(optimizer)
checks = Checks("Expansion")


def outputs() -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def change(before: torch.Tensor) -> float:
    return float((outputs() - before).abs().max() / before.abs().max())


before = outputs()
moment = optimizer.state[model.fc1.weight]["exp_avg"].clone()
receipt = engine.expand_layer("fc1", 16)
checks.check("the function stays", change(before) <= 1e-6, f"{change(before):.1e}")
checks.check("16 neurons more", model.fc1.out_features == 48, f"{model.fc1.out_features}")
checks.check(
    "their ids were never used",
    min(receipt.added_ids) > max(max(of) for of in ids.values()),
    f"{receipt.added_ids[0]} to {receipt.added_ids[-1]}",
)
kept = optimizer.state[model.fc1.weight]["exp_avg"][:32]
checks.check("moments of the others stay", torch.equal(kept, moment), "equal")
engine.prune_neurons(receipt.added_ids, compensate=False)
checks.check("pruned again, the old model is back", torch.equal(outputs(), before), "equal")

engine.expand_layer("fc1", 16)
fresh = model.fc2.weight[:, 32:].detach().clone()
train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, progress=False)
moved = float((model.fc2.weight[:, 32:].detach() - fresh).abs().max())
checks.check("what is new learns", moved > 0, f"weights moved by up to {moved:.1e}")

model.eval()
before = outputs()
for layer in ("fc1", "fc2"):
    receipt = engine.insert_layer(after=layer)
    checks.check(
        f"a layer behind {layer} changes nothing", change(before) <= 1e-6, f"{change(before):.1e}"
    )
loss, _ = train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, progress=False)
checks.check("training goes on", loss == loss, f"loss {loss:.3f}")
checks.finish()

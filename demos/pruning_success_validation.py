"""Validation: removal in place keeps its promises, on a trained network with planted faults."""

import copy

import torch
from _checks import Checks
from _common import quick
from _planting import plant_dead, plant_twin
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronEngine

set_seed(0)
train, test = get_data_loaders(train_limit=quick(10_000), test_limit=quick(2_000))
model = FashionMLP([64, 32])
optimizer = torch.optim.Adam(model.parameters())
train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, progress=False)
plant_dead(model.fc1, [3, 17])
plant_twin(model.fc1, original=5, twin=9, scale=2.0)
model.eval()
images = torch.cat([x for x, _ in test])
engine = NeuronEngine()
ids = engine.track_model(model, "FashionMLP", example_inputs=images[:16])
engine.attach_optimizer(optimizer)
engine.calibrate((x for x, _ in train), limit=100)
checks = Checks("Pruning")


def outputs(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(images)


dense = outputs(model)
told = engine.prune_neurons({"fc1": [3, 17, 9]}, dry_run=True)
checks.check("a dry run touches nothing", torch.equal(outputs(model), dense), str(told.promise))
receipt = engine.prune_neurons({"fc1": [3, 17, 9]})
change = float((outputs(model) - dense).abs().max() / dense.abs().max())
checks.check("dead and repeated neurons go without a trace", change < 1e-5, f"{change:.1e}")
checks.check("the receipt says so", receipt.promise == "exact", receipt.promise)
checks.check("three neurons less", model.fc1.out_features == 61, f"{model.fc1.out_features}")
gone = sorted(receipt.removed_ids)
checks.check("the right ids", gone == [ids["fc1"][0] + i for i in (3, 9, 17)], str(gone))

engine.undo()
checks.check("undo gives it back, bit for bit", torch.equal(outputs(model), dense), "equal")

accuracy = {}
for compensate in (False, True):
    masked = copy.deepcopy(model)
    units = list(range(0, 64, 2))
    receipt = engine.prune_neurons({"fc1": units}, compensate=compensate)
    accuracy[compensate] = evaluate(model, test)[1]
    if not compensate:
        with torch.no_grad():
            masked.fc2.weight[:, units] = 0
        gap = float((outputs(model) - outputs(masked)).abs().max() / outputs(masked).abs().max())
        checks.check("zero in their place equals the masked model", gap < 1e-5, f"{gap:.1e}")
    engine.undo()
checks.check(
    "half of a layer gone: the rest takes over",
    accuracy[True] > accuracy[False],
    f"accuracy {accuracy[True]:.2%} with and {accuracy[False]:.2%} without takeover",
)

receipt = engine.compress(0.5, "parameters", progress=False)
share = receipt.parameters_after / receipt.parameters_before
checks.check("compress meets its budget", abs(share - 0.5) <= 0.02, f"{share:.1%} for 50%")
held = {id(p) for group in optimizer.param_groups for p in group["params"]}
live = {id(p) for p in model.parameters()}
checks.check("the optimizer holds exactly the live parameters", held == live, f"{len(held)}")
loss, _ = train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, progress=False)
checks.check("training goes on", loss == loss, f"loss {loss:.3f}")
checks.finish()

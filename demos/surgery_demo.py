"""Surgery in mid-training: half of a layer goes, the same model and optimizer train on.

With zero in the place of the removed neurons the accuracy drops; where the others take over what they can explain, it
hardly does. Then training goes on.
"""

import torch
from _common import quick
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronEngine

set_seed(0)
train, test = get_data_loaders(train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([256, 64])
optimizer = torch.optim.Adam(model.parameters())
engine = NeuronEngine()
neuron_map = engine.track_model(model, "FashionMLP", next(iter(train))[0][:8])
engine.attach_optimizer(optimizer)
print(engine.structure, "\n")

for _ in range(2):
    train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, engine)
print(
    f"Two epochs, {sum(p.numel() for p in model.parameters()):,} parameters: {evaluate(model, test)[1]:.2%}"
)

# The neurons of fc1 that vary least tell fc2 least.
stats = engine.get_dataset_statistics()
ranked = sorted(neuron_map["fc1"], key=lambda neuron: stats[neuron]["std_deviation"])
engine.prune_neurons(ranked[:128], compensate=False)
print(f"Half of fc1 gone, zero in its place: {evaluate(model, test)[1]:.2%}")
engine.undo()

engine.calibrate((images for images, _ in train), limit=40)
receipt = engine.prune_neurons(ranked[:128])
print(receipt)
print(f"Half of fc1 gone, the rest takes over: {evaluate(model, test)[1]:.2%}")

train_epoch(model, train, nn.CrossEntropyLoss(), optimizer, engine)
print(f"One more epoch with the same optimizer: {evaluate(model, test)[1]:.2%}")

engine.prune_neurons({"fc2": [0, 1, 2]})
engine.undo()
print(f"Three neurons of fc2 removed, and the removal undone: {evaluate(model, test)[1]:.2%}")

"""Five neurons are silenced before training. The analysis of the whole test set finds them."""

import torch
from _common import quick
from _planting import plant_dead
from torch import nn

from fashion_mnist_mlp import FashionMLP, evaluate, get_data_loaders, set_seed, train_epoch
from tracker import NeuronTracker

PLANTED = [10, 11, 12, 13, 14]

set_seed(0)
train, test = get_data_loaders(batch_size=64, train_limit=quick(20_000), test_limit=quick(10_000))
model = FashionMLP([128, 64])
plant_dead(model.fc2, PLANTED)
print(f"Data: {train.source}")
print(f"Planted dead neurons: fc2 {PLANTED}. Training for one epoch ...")
train_epoch(model, train, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))

tracker = NeuronTracker()
tracker.track_model(model, "FashionMLP")
tracker.register_activation_hooks(model)
tracker.start_tracking()
_, accuracy = evaluate(model, test)
tracker.stop_tracking()
tracker.print_dataset_summary()

for layer, stats in tracker.get_layer_summary().items():
    print(
        f"{layer}: {stats['dead_percentage']:.1f}% dead, "
        f"fires in {stats['avg_firing_frequency']:.1%} of observations"
    )
found = [tracker.get_neuron_info(n)[1] for n in tracker.get_dead_neurons()["fc2"]]
print(f"\nAccuracy {accuracy:.1%}. Training never woke the dead: a ReLU at zero has no gradient.")
print(f"Planted: {PLANTED}\nFound:   {found}")

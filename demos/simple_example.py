"""Quick start: every neuron gets an id, and is watched while pictures of clothes pass."""

from _common import quick

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed
from tracker import NeuronEngine

set_seed(0)
model = FashionMLP([128, 64])
images, _ = next(iter(get_data_loaders(batch_size=256, train_limit=quick(256))[0]))

engine = NeuronEngine()
neuron_map = engine.track_model(model, "FashionMLP")
for layer, ids in neuron_map.items():
    print(f"{layer}: neurons {ids[0]} to {ids[-1]}")
print(f"Total neurons: {engine.get_summary()['total_neurons']}")

engine.start_tracking()
model(images)
engine.stop_tracking()
print("Neuron 42 is (layer, index):", engine.get_neuron_info(42))
stats = engine.get_neuron_stats(42)
print(
    f"Over {stats['observations']} pictures: mean {stats['mean']:.4f}, "
    f"variance {stats['variance']:.4f}, fires in {stats['firing_frequency']:.1%}"
)

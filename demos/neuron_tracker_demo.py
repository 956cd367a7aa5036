"""One engine, four architectures: ids that go on counting, and a map of all neurons as JSON."""

import json

import torch
from _common import LOGS, quick, wrote
from torch import Tensor, nn

from fashion_mnist_mlp import FashionMLP, get_data_loaders, set_seed
from tracker import NeuronTracker


class RowReader(nn.Module):
    """Reads a picture row by row, as a sequence of 28 steps."""

    def __init__(self, reader: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.reader, self.head = nn.Linear(28, 32), reader, nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 1, 28, 28)."""
        read = self.reader(self.embed(images.squeeze(1)))
        steps = read[0] if isinstance(read, tuple) else read
        return self.head(steps[:, -1])


set_seed(0)
convolutional = nn.Sequential(
    nn.Conv2d(1, 8, 3),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(16 * 11 * 11, 10),
)
models = {
    "MLP": FashionMLP([128, 64]),
    "CNN": convolutional,
    "LSTM": RowReader(nn.LSTM(32, 24, batch_first=True, bidirectional=True), 48),
    "Transformer": RowReader(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 32),
}
_, test = get_data_loaders(batch_size=128, test_limit=quick(256))

tracker = NeuronTracker()
neuron_maps = {}
for name, model in models.items():
    neuron_maps[name] = tracker.track_model(model, name)
    tracker.start_tracking()
    with torch.no_grad():
        for images, _ in test:
            model.eval()(images)
    tracker.stop_tracking()

    print(f"\n{name}: {tracker.get_summary()['total_neurons']} neurons")
    print(f"  {'layer':<20} {'type':<25} {'ids':<14} observations per neuron")
    for layer, row in tracker.get_layer_summary().items():
        ids = neuron_maps[name][layer]
        seen = tracker.get_neuron_stats(ids[0])["observations"]
        print(f"  {layer:<20} {row['layer_type']:<25} {f'{ids[0]} to {ids[-1]}':<14} {seen}")

print("\nA map or a sequence gives one observation for each picture and position.")
for neuron_id in (128, 250, 400):
    print("Neuron", neuron_id, "is (layer, index)", tracker.get_neuron_info(neuron_id))

path = LOGS / "neuron_mapping_result.json"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(neuron_maps) + "\n", encoding="utf-8")
wrote(path)

"""`engine.structure`: where the example comes from, and whose neurons the units are."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, StructureError


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )


def test_the_first_forward_pass_supplies_the_example() -> None:
    model, engine = convnet(), NeuronEngine()
    engine.track_model(model)
    with pytest.raises(StructureError, match="Run the model once"):
        _ = engine.structure
    model(torch.randn(2, 1, 8, 8))
    assert [(g.name, g.kind, g.size) for g in engine.structure.groups] == [
        ("0", "channel", 4),
        ("4", "neuron", 5),
    ]
    assert engine.structure.coverage > 0.99


@pytest.mark.parametrize("as_keyword", [False, True])
def test_example_inputs_as_tensor_tuple_and_dict(as_keyword: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convnet()

        def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
            return self.body(image) * scale

    x = torch.randn(2, 1, 8, 8)
    model, engine = Model(), NeuronEngine()
    engine.track_model(model, "m", {"image": x, "scale": 2.0} if as_keyword else (x, 2.0))
    assert len(engine.structure.groups) == 2
    late = NeuronEngine()
    late.track_model(model)
    model(x, scale=3.0)
    assert len(late.structure.groups) == 2


def test_units_know_the_ids_of_their_neurons() -> None:
    model, engine = convnet(), NeuronEngine()
    ids = engine.track_model(model, "m", torch.randn(2, 1, 8, 8))
    channels, neurons = engine.structure.groups
    # A channel is a neuron of the convolution and one of its norm.
    assert channels.neuron_ids(2) == (ids["0"][2], ids["1"][2])
    assert neurons.neuron_ids(3) == (ids["4"][3],)
    assert [(s.tensor, s.dim, len(s.indices), s.role) for s in channels.slices([1, 2])] == [
        ("0.weight", 0, 2, "produces"),
        ("0.bias", 0, 2, "produces"),
        ("1.weight", 0, 2, "carries"),
        ("1.bias", 0, 2, "carries"),
        ("1.running_mean", 0, 2, "carries"),
        ("1.running_var", 0, 2, "carries"),
        ("4.weight", 1, 72, "reads"),
    ]


def test_tracing_is_not_observed_and_changes_nothing() -> None:
    model, engine = convnet(), NeuronEngine()
    engine.track_model(model)
    engine.start_tracking()
    model(torch.randn(2, 1, 8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stats = engine.get_neuron_stats(0)
    print(engine.structure)
    assert engine.get_neuron_stats(0) == stats
    model(torch.randn(2, 1, 8, 8))
    assert engine.get_neuron_stats(0)["total_samples"] == 4
    for key in before:
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(before[key], model.state_dict()[key])


def test_a_model_that_cannot_be_traced_says_why() -> None:
    lazy, engine = nn.Sequential(nn.LazyLinear(3)), NeuronEngine()
    engine.track_model(lazy, "lazy")
    with pytest.raises(StructureError, match="Run the model once"):
        _ = engine.structure
    meta = nn.Sequential(nn.Linear(4, 3, device="meta"))
    engine = NeuronEngine()
    engine.track_model(meta, "meta", torch.randn(2, 4, device="meta"))
    with pytest.raises(StructureError, match="meta device"):
        _ = engine.structure


def test_the_report_names_groups_and_what_is_frozen() -> None:
    model, engine = convnet(), NeuronEngine()
    engine.track_model(model, "m", torch.randn(2, 1, 8, 8))
    text = str(engine.structure)
    assert "2 groups, 99.7% of the parameters prunable" in text
    assert "part of the model's output" in text
    assert "0, 1 -> 4" in text or "0 -> 4" in text


class Listener:
    """A user's hook that is a method of what cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def hear(self, *args: object) -> None:
        self.calls += 1


def test_hooks_that_cannot_be_copied_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    listener = Listener()
    model.register_forward_hook(listener.hear)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(3, 4))
    assert engine.prune_units({"0": [1]}).promise == "masked"
    model[0].lock = threading.Lock()
    other = nn.Sequential(model, nn.ReLU())
    engine.track_model(other, "other", example_inputs=torch.randn(3, 4))
    with pytest.raises(StructureError, match="cannot be copied"):
        _ = engine.structure

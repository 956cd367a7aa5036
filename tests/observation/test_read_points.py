"""Neurons are observed where they are read: behind the nonlinearity, against hooks on the reading module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.b(torch.relu(self.a(x))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 7), nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip


VECTORS, IMAGES = (40, 6), (10, 1, 12, 12)
# Model, shape of its input, layer → module at whose input it is read, and the map's positions if it was flattened.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "mlp": (mlp, VECTORS, {"0": "2", "3": "5"}),
    "conv": (conv, IMAGES, {"0": "4", "1": "4", "4": "7", "7": "9"}),
    "gated": (Gated, VECTORS, {"gate": "down", "up": "down"}),
    "residual": (Residual, VECTORS, {"a": "b"}),
}


@pytest.mark.parametrize("given", [True, False], ids=["example inputs", "first pass"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_a_neuron_is_observed_where_it_is_read(case: str, mode: str, given: bool) -> None:
    build, shape, reads = CASES[case]
    torch.manual_seed(0)
    model = build().train(mode == "train")
    x = torch.randn(shape)
    engine = NeuronEngine()
    neurons = engine.track_model(model, "m", example_inputs=x if given else None)
    engine.start_tracking(enable_correlation_analysis=True)
    seen: dict[str, Tensor] = {}
    for reader in set(reads.values()):
        model.get_submodule(reader).register_forward_pre_hook(
            lambda m, args, reader=reader: seen.__setitem__(reader, args[0].detach().double())
        )
    model(x)
    for layer, reader in reads.items():
        ids = neurons[layer]
        read = seen[reader]
        if read.ndim == 2:
            read = read.unflatten(1, (len(ids), -1))  # of a flattened map, each position counts
        rows = read.flatten(2).transpose(1, 2).flatten(0, 1)
        for slot, neuron in enumerate(ids):
            stats = engine.get_neuron_stats(neuron)
            assert stats["observations"] == len(rows)
            assert stats["mean"] == pytest.approx(float(rows[:, slot].mean()), rel=1e-5, abs=1e-7)
            firing = float((rows[:, slot].abs() > 0.01).double().mean())
            assert stats["firing_frequency"] == pytest.approx(firing)


def test_what_structure_cannot_tell_is_observed_at_its_own_output() -> None:
    model = Residual()
    x = torch.randn(VECTORS)
    engine = NeuronEngine()
    neurons = engine.track_model(model, "m", example_inputs=x)
    engine.start_tracking()
    model(x)
    for layer, own in (("stem", model.stem(x)), ("head", model(x))):
        means = [engine.get_neuron_stats(n)["mean"] for n in neurons[layer]]
        before_or_twice = own.detach().double().mean(0)
        assert means == pytest.approx(before_or_twice.tolist(), rel=1e-4, abs=1e-6)


def test_a_silent_relu_unit_is_dead() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0
    for observe, dead in (("reads", [2]), ("output", [])):
        engine = NeuronEngine(observe=observe)
        engine.track_model(model)
        engine.start_tracking()
        model(torch.randn(30, 6))
        assert engine.get_dead_neurons()["0"] == dead
        engine.clear_hooks()


def test_the_window_goes_on_through_surgery() -> None:
    torch.manual_seed(0)
    model, x = conv().eval(), torch.randn(IMAGES)
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=x)
    engine.start_tracking()
    with torch.no_grad():
        model(x)
    before = engine.get_neuron_stats(1)
    engine.prune_neurons({"0": [0, 2], "4": [5]}, compensate=False)
    after = engine.get_neuron_stats(1)
    assert {**after, "local_index": 1} == before
    with torch.no_grad():
        model(x)
    assert engine.get_neuron_stats(1)["observations"] == 2 * before["observations"]


def test_our_own_passes_are_seen_by_nobody() -> None:
    model, calls = mlp(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    other = NeuronEngine()
    other.track_model(model, "m")
    other.start_tracking()
    engine = NeuronEngine()
    engine.track_model(model, "m")
    engine.start_tracking()
    model(torch.randn(VECTORS))
    assert len(calls) == 7
    assert other.get_neuron_stats(0)["observations"] == 40


def test_a_dropout_before_a_split_is_no_obstacle() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            u, v = self.drop(torch.relu(self.a(x))).chunk(2, -1)
            return self.b(u * v)

    model = Split()
    engine = NeuronEngine()
    engine.track_model(model, "split", example_inputs=torch.randn(VECTORS))
    assert [g.size for g in engine.structure.groups if g.prunable] == [4]

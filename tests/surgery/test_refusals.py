"""What is refused, with nothing touched: bad requests, models that cannot be tried on, and moments that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.bits import equal
from tests.surgery.test_removal import X, snapshot, trained
from tracker import NeuronEngine, SurgeryError, TrackerError, UnknownNeuronError


@pytest.mark.parametrize(
    ("units", "why"),
    [
        ({}, "Nothing was asked"),
        ({"0": []}, "Nothing was asked"),
        ({"9": [0]}, "no group '9'"),
        ({"0": [-1]}, "no unit -1"),
        ({"0": [6]}, "no unit 6"),
        ({"0": [1.0]}, "whole number"),
        ({"0": [True]}, "whole number"),
        ({"0": [1, 1]}, "named twice"),
        ({"0": [0, 1, 2, 3, 4, 5]}, "at least 1 must remain"),
    ],
)
def test_bad_units_are_refused(units: dict[str, list[Any]], why: str) -> None:
    model, optimizer, engine = trained()
    before = snapshot(model, optimizer, engine)
    with pytest.raises(SurgeryError, match=why):
        engine.prune_units(units)
    assert equal(snapshot(model, optimizer, engine), before)


def test_bad_neurons_are_refused() -> None:
    model, optimizer, engine = trained()
    before = snapshot(model, optimizer, engine)
    ids = engine.track_model(model)
    for neurons, error, why in (
        ([10**6], UnknownNeuronError, "There is no neuron"),
        ({"4": [10]}, UnknownNeuronError, "no neuron 10"),
        ({"4": [-1]}, UnknownNeuronError, "no neuron -1"),
        ({"nope": [0]}, TrackerError, "No tracked layer"),
        ([ids["6"][0]], SurgeryError, "part of the model's output"),
        ([ids["4"][0]] * 2, SurgeryError, "named twice"),
        (ids["4"], SurgeryError, "at least 1 must remain"),
    ):
        with pytest.raises(error, match=why):
            engine.prune_neurons(neurons, compensate=False)
    other = nn.Sequential(nn.Linear(4, 3))
    foreign = engine.track_model(other, "other")["0"][0]
    engine.register_activation_hooks(model)
    with pytest.raises(UnknownNeuronError, match="belongs to the model 'other'"):
        engine.prune_neurons([foreign], compensate=False)
    engine.start_tracking(enable_correlation_analysis=True)
    assert equal(snapshot(model, optimizer, engine)[:6], before[:6])


def test_a_model_changed_behind_the_engines_back() -> None:
    model, _, engine = trained()
    _ = engine.structure
    with torch.no_grad():
        model[4].weight.set_(model[4].weight[:9].clone())
        model[4].bias.set_(model[4].bias[:9].clone())
    with pytest.raises(TrackerError):
        engine.prune_units({"4": [9]})


def test_not_inside_a_forward_pass() -> None:
    model, _, engine = trained()
    refused: list[str] = []

    def meddle(*_: object) -> None:
        with pytest.raises(SurgeryError, match="under way") as caught:
            engine.prune_units({"4": [1]})
        refused.append(str(caught.value))

    _ = engine.structure
    handle = model[2].register_forward_hook(meddle)
    model(X)
    handle.remove()
    assert refused
    engine.prune_units({"4": [1]})


class Shifted(nn.Module):
    """The only parameter that learns is one that no product needs again: autograd itself would miss nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8).requires_grad_(False)
        self.shift = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.shift).sum(-1, keepdim=True)


@pytest.mark.parametrize("undone", [False, True])
def test_a_loss_of_before_a_change_cannot_be_sent_back_after_it(undone: bool) -> None:
    """Between forward and backward: no gradient of an earlier shape ever comes to lie beside the new weights."""
    for model, x in ((trained()[0], X), (Shifted(), torch.randn(4, 6))):
        engine = NeuronEngine()
        engine.track_model(model, "model", x)
        waiting = model(x).sum()
        engine.prune_units({engine.structure.groups[0].name: [1]})
        if undone:
            waiting = model(x).sum()
            engine.undo()
        with pytest.raises(
            (SurgeryError, RuntimeError),
            match=r"before the model was changed|modified by an inplace",
        ):
            waiting.backward()
        for p in model.parameters():
            assert p.grad is None or p.grad.shape == p.shape
        model.zero_grad()
        model(x).sum().backward()


class Itself(nn.Linear):
    """Gives itself for its copy."""

    def __deepcopy__(self, memo: object) -> Itself:
        return self


class Sharing(nn.Linear):
    """Its copy has its own weights."""

    def __deepcopy__(self, memo: object) -> Sharing:
        other = Sharing(self.in_features, self.out_features)
        other.weight, other.bias = self.weight, self.bias
        return other


class Noting(nn.Linear):
    """Its copy has its own buffer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.ones(sizes[1]))

    def __deepcopy__(self, memo: object) -> Noting:
        other = Noting(self.in_features, self.out_features)
        other.load_state_dict(self.state_dict())
        other.seen = self.seen
        return other

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.seen


@pytest.mark.parametrize("kind", [Itself, Sharing, Noting])
def test_what_would_be_tried_on_the_model_itself_is_refused(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    expected = model(x)
    model[0].register_forward_hook(lambda m, args, out: None)
    engine = NeuronEngine()
    engine.track_model(model, "model", x)
    hooks = len(model[0]._forward_hooks)
    for change in (
        lambda: engine.prune_units({"0": [1]}),
        lambda: engine.prune_units({"0": [1]}, verify=False),
        lambda: engine.insert_layer(after="0"),
        lambda: engine.expand_layer("0", 2),
    ):
        with pytest.raises(TrackerError):
            change()
        assert torch.equal(model(x), expected)
        assert type(model[0].in_features) is int  # none that remembers where it comes from
        assert len(model[0]._forward_hooks) == hooks

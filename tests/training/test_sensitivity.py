"""Curvature is that at a layer's own output, whatever was inserted behind it; sums of several processes add up."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine, Policy
from tracker.surgery.calibration.consumers import Consumer
from tracker.training.sensitivity import FACTS, LossWatcher


def watched(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sums and facts of the layer "0" over some training passes."""
    one = Consumer("0", "0.weight", reads=1, makes=0, axis=-1, bias="0.bias")
    sums, facts = dict[str, Tensor](), torch.zeros(FACTS, dtype=torch.float64)
    watcher = LossWatcher(model, [one], sums, facts)
    for x, y in batches:
        (model(x) - y).square().sum().backward()
    for handle in watcher.handles:
        handle.remove()
    return sums["0.weight"], facts


def test_an_inserted_layer_is_not_the_layer_before_it() -> None:
    """Of equal widths nothing but the numbers tells: compared with gradients by hand, by another way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(32, 5), torch.randn(32, 3)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.insert_layer("0")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "inserted" in name:  # as after training: no identity any more
                parameter += torch.randn_like(parameter)
    found, _ = watched(model, [(x, y)])
    own = dict[str, Tensor]()
    handle = model[0].register_forward_hook(lambda m, a, o: own.update(o=o), prepend=True)
    loss = (model(x) - y).square().sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, own["o"])
    assert torch.allclose(found, gradient.T @ gradient, rtol=1e-4)


def test_shares_of_a_batch_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(64, 5), torch.randn(64, 3)
    y[:32] *= 30  # of one share the gradients are much larger
    whole, facts = watched(model, [(x, y)])
    halves = [watched(model, [(x[i : i + 32], y[i : i + 32])]) for i in (0, 32)]
    assert torch.allclose(halves[0][0] + halves[1][0], whole, rtol=1e-4)
    assert torch.allclose((halves[0][1] + halves[1][1])[-1], facts[-1])


class Maps(nn.Module):
    """Classes along dimension 1, as of a segmentation, or along the last one."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 5, 1), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x).relu())
        return y.transpose(1, 2) if self.last else y


def test_the_dimension_of_classes_does_not_matter() -> None:
    found: list[Any] = []
    for last in (True, False):
        model = Maps(last)
        torch.manual_seed(1)
        x, y = torch.randn(16, 3, 7), torch.randint(5, (16, 7))
        engine = NeuronEngine()
        engine.track_model(model, "m", example_inputs=x)
        seen: list[Any] = []

        def rule(candidates: Any, *args: Any, seen: list[Any] = seen) -> None:
            seen.extend(candidates)

        engine.start_self_modification(Policy.of(rule, warm_up=6, every=8, look=4, settle=2))
        for _ in range(7):
            out = model(x).transpose(1, 2) if last else model(x)
            loss = nn.functional.cross_entropy(out, y)
            loss.backward()
            engine.step(loss)
        found.append(seen[0])
    assert found[0].in_loss
    assert found[1].in_loss
    assert found[0].errors == pytest.approx(found[1].errors, rel=1e-3)


@pytest.mark.parametrize("grow", [False, True])
def test_no_output_outlives_its_pass(grow: bool) -> None:
    """A hook that holds the tensor it is part of is never freed: 100 MB a step, of a language model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(2, 16, 5), torch.randint(3, (32,))
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.start_self_modification(Policy(warm_up=30, every=30, look=29, settle=1, grow=grow))
    seen: list[weakref.ref[Tensor]] = []
    handles = [m.register_forward_hook(lambda m, a, o: seen.append(weakref.ref(o))) for m in model]
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y)
        loss.backward()
        optimizer.step()
        engine.step(loss.detach())
    del loss
    gc.collect()
    assert len(seen) >= 24  # engines run passes of their own as well
    assert not [ref for ref in seen if ref() is not None]
    for handle in handles:
        handle.remove()

"""What `calibrate` gives back is a number, and says what it is of."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import NeuronEngine

X, Y = torch.randn(40, 4), torch.randint(3, (40,))


def net(head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), head)


def engine_of(model: nn.Module) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(model, "net", example_inputs=X[:8])
    return engine


def cross_entropy(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


@pytest.mark.parametrize(
    ("batches", "options", "samples", "count", "taken", "loss"),
    [
        (list(zip(X.split(16), Y.split(16), strict=True)), {"loss": cross_entropy}, 40, 3, "[1]", "given"),
        (list(zip(X.split(16), Y.split(16), strict=True)), {}, 40, 3, "not [1]", "divergence"),
        (X.split(10), {"limit": 2}, 20, 2, "Tensor(10, 4)", "divergence"),
        ([{"rows": X}], {"inputs": lambda batch: batch["rows"]}, 40, 1, "by `inputs`", "divergence"),
    ],
)  # fmt: skip
def test_it_says_what_was_observed(
    batches: Any, options: Any, samples: int, count: int, taken: str, loss: str
) -> None:
    model = net(nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(-1)))
    told = engine_of(model).calibrate(batches, **options)
    assert (told.samples, told.batches, told.layers) == (samples, count, ("2", "4.0"))
    assert taken in str(told.taken)
    assert loss in str(told.loss)
    text = repr(told)
    assert all(part in text for part in (f"{samples} samples", taken, loss, "2, 4.0"))
    assert str(told) == text
    assert "4.0" in told._repr_html_()


def test_it_is_the_number_that_it_was() -> None:
    model = net(nn.Linear(6, 3))
    told = engine_of(model).calibrate(X.split(10))
    assert told == 2
    assert told > 1
    assert (f"{told}", json.dumps([told]), {2: "two"}[told]) == ("2", "[2]", "two")
    for same in (copy.deepcopy(told), pickle.loads(pickle.dumps(told))):
        assert (same, repr(same)) == (2, repr(told))


def test_without_gradients_it_says_so() -> None:
    class Closed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model = net(Closed(6, 3))
    told = engine_of(model).calibrate(X.split(10))
    assert told.loss is None
    assert "no gradients" in repr(told)

"""What is not known is said, with the reason; widths that a buffer ties together are one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.structure.test_float64 import Casting
from tracker import NeuronEngine
from tracker.structure import rule, trace_structure
from tracker.structure.rules import registry


@torch.library.custom_op("test_reasons::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.test_reasons.twice(self.a(x)))


@pytest.fixture
def unruled() -> Iterator[None]:
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


@pytest.mark.usefixtures("unruled")
@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (lambda op: op.give(op.out, op.axis(op.args[0])), AttributeError),
        (lambda op: op.give(op.out, []), ValueError),
        (lambda op: 1 / 0, ZeroDivisionError),
    ],
)
def test_a_users_rule_that_raises_is_named_and_its_exception_kept(
    broken: Callable[..., None], kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    rule("test_reasons::twice")(broken)
    with caplog.at_level(logging.WARNING, "tracker"):
        structure = trace_structure(Custom(), torch.randn(3, 4))
    (failure,) = structure.failures
    assert type(failure.error) is kind
    assert failure.operation == "test_reasons::twice"
    assert "test_reasons.py" in failure.why
    assert kind.__name__ in str(structure)
    assert kind.__name__ in caplog.text
    (reason,) = {f.reason for f in structure.frozen if (f.tensor, f.dim) == ("a.weight", 0)}
    assert f"the rule of test_reasons::twice raised {kind.__name__}" in reason


@pytest.mark.usefixtures("unruled")
def test_a_users_rule_that_is_right_lets_units_go() -> None:
    @rule("test_reasons::twice")
    def _(op: registry.Op) -> None:
        op.give(op.out, op.axes(op.args[0]))

    structure = trace_structure(Custom(), torch.randn(3, 4))
    assert not structure.failures
    assert [g.prunable for g in structure.groups] == [True]


def test_where_layers_are_observed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Locked(Casting):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    for kind, fallback in ((Casting, ""), (Locked, "cannot be copied")):
        model, x, engine = kind(), torch.randn(5, 6), NeuronEngine()
        engine.track_model(model, example_inputs=x)
        with caplog.at_level(logging.WARNING, "tracker"):
            engine.start_tracking()
        model(x)
        layer = engine.get_layer_summary()["a"]
        notes = engine.generate_optimization_recommendations()["metadata"]["notes"]
        if fallback:
            assert layer["observed_at"] == "its own output"
            assert fallback in layer["fallback"]
            assert fallback in caplog.text
            assert any(fallback in note for note in notes)
        else:
            assert (layer["observed_at"], layer["fallback"]) == ("the input of b", "")
            assert not caplog.text


FILLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros_like": lambda h, y: fill(torch.zeros_like(h), y),
    "empty_like": lambda h, y: torch.empty_like(h).copy_(y),
    "zeros": lambda h, y: fill(torch.zeros(h.shape), y),
    "new_zeros": lambda h, y: fill(h.new_zeros(h.size()), y),
    "full": lambda h, y: fill(torch.full((len(h), h.shape[1]), 1.0), y),
    "added": lambda h, y: torch.zeros_like(h).index_add_(0, torch.arange(len(h)), y),
}


def fill(buffer: Tensor, values: Tensor) -> Tensor:
    buffer[:, :] = values
    return buffer


@pytest.mark.parametrize("way", sorted(FILLED))
def test_what_is_written_into_a_buffer_of_anothers_size_goes_with_it(way: str) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.c(torch.relu(FILLED[way](h, self.b(h))))

    model, x, engine = Buffered(), torch.randn(4, 6), NeuronEngine()
    engine.track_model(model, example_inputs=x)
    (group,) = engine.structure.groups
    assert group.prunable
    assert group.layers == ("a", "b")
    with torch.no_grad():
        model.b.weight[:, [1, 2, 7]] = model.c.weight[:, [1, 2, 7]] = 0
        expected = model(x)
    assert engine.prune_units({group.name: [1, 2, 7]}).promise == "masked"
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_a_reader_that_saw_no_variance_loses_nothing(of: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1)
            self.f1, self.f2 = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            gate = self.f2(torch.relu(self.f1(h.mean((2, 3), keepdim=True))))
            return self.b(h * torch.sigmoid(gate))

    model, engine = Pooled(), NeuronEngine()
    engine.track_model(model, example_inputs=torch.randn(1, 3, 8, 8))
    receipt = engine.compress(keep=0.7, of=of, progress=False)
    assert receipt.parameters_after < receipt.parameters_before

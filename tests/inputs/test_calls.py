"""Example inputs are calls: each is made as it says, and what is no call is refused by name."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tracker import Call, NeuronEngine, StructureError


class Noted(nn.Module):
    """Notes how it was called, outside of itself: what it holds is put back."""

    seen: ClassVar[list[tuple[str, bool, tuple[Any, ...]]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.seen.clear()

    def forward(self, x: Tensor, y: Tensor | None = None, *, more: bool = False) -> Tensor:
        self.seen.append(("forward", self.training, (y is not None, more)))
        return self.last(self.first(x).relu())

    def encode(self, x: Tensor) -> Tensor:
        self.seen.append(("encode", self.training, ()))
        return self.first(x)


X = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (X, {("forward", (False, False))}),
        ((X, X), {("forward", (True, False))}),
        ({"x": X, "more": True}, {("forward", (False, True))}),
        (Call(X, more=True), {("forward", (False, True))}),
        ([X, (X, X)], {("forward", (False, False)), ("forward", (True, False))}),
        (
            [Call(X, method="encode"), {"x": X, "more": True}],
            {("encode", ()), ("forward", (False, True))},
        ),
    ],
    ids=["tensor", "tuple", "dict", "call", "two calls", "two methods"],
)
def test_each_example_is_called_as_it_says(given: Any, seen: set[tuple[str, Any]]) -> None:
    model = Noted()
    NeuronEngine().track_model(model, "noted", example_inputs=given)
    assert {(method, how) for method, _, how in model.seen} == seen
    assert model.training


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty list"),
        ([X, 3], "Item 1 of the list example_inputs is of type int"),
        ([[X]], "Item 0 of the list example_inputs is of type list"),
        ([Call(X, method="encode")], "None of the example calls is of forward"),
        ([X, Call(X, method="decode")], "A call of decode of Noted with the example inputs failed"),
    ],
)
def test_what_is_no_call_is_refused(given: Any, said: str) -> None:
    engine = NeuronEngine()
    with pytest.raises(StructureError, match=said):
        engine.track_model(Noted(), "noted", example_inputs=given)


def test_a_call_is_made_in_the_modes_that_it_names() -> None:
    for training, modes in ((None, [False, True]), (True, [True]), (False, [False])):
        calls = Call(X, y=X, method="encode", training=training).modes()
        assert [call.training for call in calls] == modes
        assert all(c.method == "encode" and c.kwargs == {"y": X} for c in calls)
    assert str(Call(X, 2, more="no", training=True)) == (
        "forward(Tensor(4, 5), 2, more='no') in train mode"
    )


def test_arguments_may_be_named_like_the_calls_own() -> None:
    call = Call.of((X,), {"method": 1, "training": 2})
    assert call.method == "forward"
    assert call.modes()[0].kwargs == {"method": 1, "training": 2}

"""Copies are compared in float64 whatever dtypes the model's code names; where that cannot be, it is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracker import NeuronEngine, StructureError, VerificationError
from tracker.inputs.calls import arguments
from tracker.structure.trace import plain_kernels
from tracker.structure.trials.float64_mode import _WIDER, Float64Code
from tracker.structure.trials.temporary_copies import (
    InFloat64,
    copy_sharing_storage,
    relative_difference,
)
from tracker.surgery import transaction


class Casting(nn.Module):
    """A hidden layer behind a cast; `free` leaves all casts out, and makes all constants in the dtype of its input."""

    free = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 12), nn.LayerNorm(8), nn.Linear(12, 8)
        self.c, self.d = nn.Linear(8, 10), nn.Linear(10, 3)
        self.kernel = torch.rand(6, 6)  # neither a parameter nor a buffer

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.relu(self.a(self.start(x))))
        return self.d(F.relu(self.c(self.middle(h))))

    def start(self, x: Tensor) -> Tensor:
        return x

    def middle(self, h: Tensor) -> Tensor:
        return h

    def dtype(self, x: Tensor, wanted: torch.dtype) -> torch.dtype:
        return x.dtype if self.free else wanted


class Float(Casting):
    def middle(self, h: Tensor) -> Tensor:
        return self.n(h.to(self.dtype(h, torch.float32))).type_as(h)


class Half(Casting):
    def middle(self, h: Tensor) -> Tensor:
        return h.to(self.dtype(h, torch.float16)).to(self.dtype(h, torch.float32)).sin().type_as(h)


class Weights(Casting):
    def middle(self, h: Tensor) -> Tensor:
        wide = self.dtype(h, torch.float32)
        weight, bias = self.n.weight.to(wide), self.n.bias.to(wide)
        return F.layer_norm(h.to(wide), (8,), weight, bias).type_as(h)


class Constant(Casting):
    def start(self, x: Tensor) -> Tensor:
        return torch.eye(len(x), dtype=self.dtype(x, torch.float32)) @ x


class Default(Casting):
    def start(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self.free else None
        out = torch.zeros(x.shape, dtype=dtype)
        out[:] = x
        return torch.ones(len(x), len(x), dtype=dtype) @ out


class Attribute(Casting):
    def start(self, x: Tensor) -> Tensor:
        return x @ self.kernel.to(x.dtype) if self.free else x @ self.kernel


class OfIntegers(Casting):
    def start(self, x: Tensor) -> Tensor:
        steps = torch.arange(6)
        steps = steps.to(x.dtype) / 2 if self.free else steps / 2
        return x @ steps.diag()


class Added(Casting):
    def start(self, x: Tensor) -> Tensor:
        index = torch.arange(len(x)).flip(0)
        return torch.zeros(x.shape, dtype=x.dtype if self.free else None).index_add_(0, index, x)


KINDS = [Float, Half, Weights, Constant, Default, Attribute, OfIntegers, Added]


def built(
    kind: Callable[[], Casting], dtype: torch.dtype = torch.float32
) -> tuple[Casting, Tensor]:
    torch.manual_seed(0)
    return kind().to(dtype).eval(), torch.randn(5, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_names_dtypes_runs_as_if_it_named_none(kind: type[Casting]) -> None:
    model, x = built(kind)
    found = InFloat64(copy_sharing_storage(model)).run(arguments(x))
    free = copy.deepcopy(model).double()
    free.free = True
    with torch.no_grad():
        assert relative_difference(found, free(x.double())) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_names_dtypes_can_be_changed(kind: type[Casting]) -> None:
    model, x = built(kind)
    with torch.no_grad():
        model(x)
        masked = copy.deepcopy(model)
        masked.b.weight[:, [1, 4]] = masked.d.weight[:, [0, 7]] = 0
        expected = masked(x)
    engine = NeuronEngine()
    engine.track_model(model, example_inputs=x)
    assert engine.structure.precision.in_float64
    receipt = engine.prune_units({"a": [1, 4], "c": [0, 7]})
    assert receipt.promise == "masked"
    assert not any("compared" in note for note in receipt.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_half_precision_with_a_norm_in_float32() -> None:
    class Norm32(nn.GroupNorm):
        def forward(self, input: Tensor) -> Tensor:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(input.float(), 2, weight, bias).type(input.dtype)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        Norm32(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    ).to(torch.bfloat16)
    x, engine = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), NeuronEngine()
    engine.track_model(model, example_inputs=x)
    assert engine.structure.precision.in_float64
    assert not any("run in float64" in group.reason for group in engine.structure.groups)
    assert engine.prune_units({"3": [1, 4]}).promise == "masked"
    assert model(x).dtype == torch.bfloat16


class Bits(Casting):
    """Cuts the last bits of its numbers off, as those of float32."""

    fault = False

    def middle(self, h: Tensor) -> Tensor:
        if self.fault:  # a tensor of the model's code that follows no width
            h = h * (1 + self.c.weight.shape[0] / 1000)
        return (h.view(torch.int32) & ~0xF).view(torch.float32)


def test_bits_of_numbers_are_not_read_as_those_of_others() -> None:
    with Float64Code(), pytest.raises(TypeError, match="bits"):
        torch.ones(3).view(torch.int32)
    model, x = built(Bits)
    with pytest.raises(StructureError, match="bits of numbers"):
        InFloat64(copy_sharing_storage(model)).run(arguments(x))


def test_where_float64_cannot_be_the_tolerance_is_said() -> None:
    model, x = built(Bits)
    with torch.no_grad():
        masked = copy.deepcopy(model)
        masked.d.weight[:, [0, 7]] = 0
        expected = masked(x)
    engine = NeuronEngine()
    engine.track_model(model, example_inputs=x)
    structure = engine.structure
    assert not structure.precision.in_float64
    assert 1e-7 < structure.precision.tolerance < 1e-3
    assert "bits of numbers" in structure.precision.why
    assert "test_float64.py" in str(structure)
    receipt = engine.prune_units({"c": [0, 7]})
    assert receipt.promise == "masked"
    assert any("own dtypes" in note and "test_float64.py" in note for note in receipt.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_faults_show_where_float64_cannot_be() -> None:
    model, x = built(Bits)
    model.fault = True
    engine = NeuronEngine()
    engine.track_model(model, example_inputs=x)
    assert not engine.structure["c"].prunable


def test_the_default_dtype_of_others_stays() -> None:
    """It belongs to the whole process: data loaders make tensors meanwhile."""
    seen = []

    class Asking(Casting):
        def start(self, x: Tensor) -> Tensor:
            seen.append(torch.get_default_dtype())
            return x

    model, x = built(Asking)
    engine = NeuronEngine()
    engine.track_model(model, example_inputs=x)
    assert engine.structure.groups
    assert set(seen) == {torch.float32}


def test_every_dtype_below_has_a_wider_one() -> None:
    for narrow, wide in _WIDER.items():
        with Float64Code():
            assert torch.ones(2, dtype=narrow).dtype == wide
            assert torch.ones(2, dtype=torch.float64).to(narrow).dtype == wide
    with Float64Code():
        assert torch.ones(2).to(torch.int32).dtype == torch.int32


class Deep(nn.Module):
    """Small differences grow on the way: its rounding is far above that of one layer."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(depth))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.body:
            x = torch.sin(6 * conv(x))
        return self.head(x)


def test_the_rounding_of_a_deep_model_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.randn(2, 3, 16, 16)
    engine = NeuronEngine()
    engine.track_model(model, example_inputs=x)
    receipt = engine.prune_units({"body.3": [1, 2, 3, 8, 9]})
    assert receipt.promise == "masked"
    with torch.no_grad(), plain_kernels():
        plain = model(x)
    rounding = relative_difference(plain, model(x).detach())
    assert rounding > 100 * torch.finfo(torch.float32).eps  # what was allowed of any model
    # And a fault of the swap is seen above it.
    swap = transaction.apply

    def faulty(plan: Any, models: Any, *args: Any, **options: Any) -> Any:
        done = swap(plan, models, *args, **options)
        if models[0] is model:
            with torch.no_grad():
                model.head.weight[0, 0] += 0.1
        return done

    monkeypatch.setattr(transaction, "apply", faulty)
    with pytest.raises(VerificationError, match=r"After the change the output .*differed"):
        engine.prune_units({"body.5": [0]})

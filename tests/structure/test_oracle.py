"""The oracle itself: what lives and dies together in models of the zoo, written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch

from tests.structure.oracle_masks import (
    copied,
    leaves,
    masked_copy,
    prune_copy,
    relative_difference,
    run,
)
from tests.structure.subjects import TOLERANCE, equals_masked, everything, fresh, models, same
from tests.zoo import ZOO


@dataclass(frozen=True)
class FakeSlice:
    tensor: str
    dim: int
    indices: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class FakeGroup:
    """Made by hand: of each axis the role, and for a unit the indices on it."""

    axes: tuple[tuple[str, int, str, Callable[[int], tuple[int, ...]]], ...]

    def slices(self, units: Iterable[int]) -> list[FakeSlice]:
        return [
            FakeSlice(tensor, dim, tuple(i for unit in units for i in of(unit)), role)
            for tensor, dim, role, of in self.axes
        ]


def itself(unit: int) -> tuple[int, ...]:
    return (unit,)


def next_one(unit: int) -> tuple[int, ...]:
    return (unit + 1,)


def four(unit: int) -> tuple[int, ...]:
    return tuple(range(4 * unit, 4 * unit + 4))


def axes(*named: tuple[str, int, str], of: Callable[[int], tuple[int, ...]] = itself) -> tuple:
    return tuple((*axis, of) for axis in named)


def eight(unit: int) -> tuple[int, ...]:
    return tuple(range(8 * unit, 8 * unit + 8))


def six(unit: int) -> tuple[int, ...]:
    return tuple(range(6 * unit, 6 * unit + 6))


def thirds(of: Callable[[int], tuple[int, ...]], third: int) -> Callable[[int], tuple[int, ...]]:
    return lambda unit: tuple(i + part * third for part in range(3) for i in of(unit))


def linear(name: str, of: Callable[[int], tuple[int, ...]] = itself) -> tuple:
    return axes((f"{name}.weight", 0, "produces"), (f"{name}.bias", 0, "produces"), of=of)


def norm(name: str, of: Callable[[int], tuple[int, ...]] = itself) -> tuple:
    held = ("weight", "bias", "running_mean", "running_var")
    return axes(*((f"{name}.{key}", 0, "carries") for key in held), of=of)


HEADS = "body.0.attention"
BY_HAND = {
    "mlp": (*linear("0"), *axes(("2.weight", 1, "reads"))),
    "mlp_prelu": (*linear("0"), *axes(("1.weight", 0, "carries"), ("2.weight", 1, "reads"))),
    "split_by_size": (*linear("first"), *axes(("a.weight", 1, "reads"))),
    "weight_norm": axes(
        ("0.parametrizations.weight.original0", 0, "produces"),
        ("0.parametrizations.weight.original1", 0, "produces"),
        ("0.bias", 0, "produces"),
        ("2.weight", 1, "reads"),
    ),
    "conv_flatten": (*linear("0"), *axes(("4.weight", 1, "reads"), of=four)),
    "conv_bn": (
        *axes(("0.0.weight", 0, "produces")),
        *norm("0.1"),
        *axes(("1.0.weight", 1, "reads")),
    ),
    "depthwise_separable": (
        *axes(("0.0.weight", 0, "produces")),
        *norm("0.1"),
        *axes(("1.0.weight", 0, "carries")),
        *norm("1.1"),
        *axes(("2.0.weight", 1, "reads")),
    ),
    # Whole groups, with their filters
    "grouped_conv": (
        *axes(("0.0.weight", 0, "produces"), of=four),
        *norm("0.1", four),
        *axes(("1.0.weight", 0, "produces"), of=six),
        *norm("1.1", six),
        *axes(("2.weight", 1, "reads"), of=six),
    ),
    "group_norm": (
        *linear("0", four),
        *axes(
            ("1.weight", 0, "carries"), ("1.bias", 0, "carries"), ("3.weight", 1, "reads"), of=four
        ),
    ),
    # Heads; the shared ones with the queries that use them
    "transformer": (
        *(axis for part in "qkv" for axis in linear(f"{HEADS}.{part}", four)),
        *axes((f"{HEADS}.out.weight", 1, "reads"), of=four),
    ),
    "transformer_fused": (
        *linear(f"{HEADS}.qkv", thirds(four, 16)),
        *axes((f"{HEADS}.out.weight", 1, "reads"), of=four),
    ),
    "transformer_gqa": (
        *linear(f"{HEADS}.q", eight),
        *linear(f"{HEADS}.k", four),
        *linear(f"{HEADS}.v", four),
        *axes((f"{HEADS}.out.weight", 1, "reads"), of=eight),
    ),
    "multihead_attention": (
        *axes(
            ("1.attention.in_proj_weight", 0, "produces"),
            ("1.attention.in_proj_bias", 0, "produces"),
            of=thirds(four, 16),
        ),
        *axes(("1.attention.out_proj.weight", 1, "reads"), of=four),
    ),
    # Dimensions of every head, in queries and keys: only silence masks them.
    "free_attention": (*linear("q", thirds(itself, 5)), *linear("k", thirds(itself, 5))),
    "lstm": (
        *axes(
            *(
                (f"rnn.{held}_l0", 0, "produces")
                for held in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ),
            of=lambda unit: (unit, unit + 10, unit + 20, unit + 30),
        ),
        *axes(("rnn.weight_hh_l0", 1, "reads"), ("head.weight", 1, "reads")),
    ),
    "tied_embedding": (
        *axes(("embedding.weight", 1, "produces")),
        *linear("body.body.2"),
        *axes(("body.body.0.weight", 1, "reads"), ("head.weight", 1, "reads")),
    ),
}
# One unit where two would leave too little, and where one would be too little to see.
PICKED = {"transformer_gqa": [0], "grouped_conv": [1], "group_norm": [1]}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_oracle_itself(name: str) -> None:
    model, inputs = fresh(name)
    whole = run(copied(model).double(), inputs)
    group, units = FakeGroup(BY_HAND[name]), PICKED.get(name, [1, 2])
    assert equals_masked(model, inputs, group, units) < 1e-10
    masked = (masked_copy(model, group, units, silence=silence) for silence in (False, True))
    assert max(relative_difference(run(m, inputs), whole) for m in masked) > TOLERANCE
    # One axis named wrongly at a time: the shapes agree, the function does not.
    for at, (tensor, dim, role, of) in enumerate(group.axes):
        if name == "tied_embedding" and tensor in {"embedding.weight", "head.weight"}:
            continue  # one matrix: wrong under one key is a union of both, of another shape
        if tensor.endswith("k.bias"):
            continue  # the same for every key, so softmax does not see it
        wrong = (tensor, dim, role, lambda unit, of=of: tuple(i + 1 for i in of(unit)))
        broken = FakeGroup((*group.axes[:at], wrong, *group.axes[at + 1 :]))
        try:
            difference = equals_masked(model, inputs, broken, units)
        except (RuntimeError, ValueError):  # whole heads or groups no longer: it does not run
            assert of is not itself
        else:
            assert difference > TOLERANCE, (tensor, dim)


def test_the_oracle_keeps_ties_and_the_original() -> None:
    model, inputs = fresh("tied_embedding")
    before = everything(model)
    pruned = prune_copy(model, FakeGroup(BY_HAND["tied_embedding"]), [0, 5])
    assert pruned.head.weight is pruned.embedding.weight
    assert pruned.head.in_features == pruned.embedding.embedding_dim == 14
    run(pruned, inputs)
    assert same(before, everything(model))


def test_the_oracle_fails_where_a_consumer_is_forgotten() -> None:
    model, inputs = fresh("mlp")
    group = FakeGroup(BY_HAND["mlp"][:-1])
    with pytest.raises(RuntimeError, match="shape"):
        run(prune_copy(model, group, [1]), inputs)


def test_the_oracle_sees_a_norm_change() -> None:
    """Columns of a normalised weight, and a softmax: removal is not the masked model."""
    for name, reader in (
        ("weight_norm_reads", "2.parametrizations.weight.original1"),
        ("softmax_units", "last.weight"),
    ):
        first = "0" if name == "weight_norm_reads" else "first"
        named = axes(
            (f"{first}.weight", 0, "produces"),
            (f"{first}.bias", 0, "produces"),
            (reader, 1, "reads"),
        )
        model, inputs = fresh(name)
        assert equals_masked(model, inputs, FakeGroup(named), [1, 2]) > 1e-3


def test_relative_difference() -> None:
    a = {"x": torch.ones(3), "y": (torch.full((2,), 4.0), None)}
    b = {"x": torch.ones(3), "y": (torch.full((2,), 5.0), None)}
    assert relative_difference(a, a) == 0
    assert relative_difference(a, b) == pytest.approx(0.2)
    for wrong in (torch.ones(2), torch.full((3,), torch.nan), [torch.ones(3)] * 2, None):
        assert relative_difference(torch.ones(3), wrong) == float("inf")
        assert relative_difference(wrong, torch.ones(3)) == float("inf")


@models()
def test_every_model_of_the_zoo_runs(name: str) -> None:
    model, inputs = fresh(name)
    single = run(model, inputs)
    double = run(copied(model).double(), inputs)
    assert all(leaf.dtype is torch.float64 for leaf in leaves(double))
    assert relative_difference(single, double) < 1e-4
    entry = ZOO[name]
    tensors = model.state_dict()
    for tensor, dim in (*entry.pinned, *entry.inexact):
        assert dim < tensors[tensor].dim()
    assert entry.expect_frozen == bool(entry.pinned) == bool(entry.words)

"""What the structure of a model says, against removal by hand and the masked model, in float64."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle_masks import leaves, masked_copy, prune_copy, randomise, relative_difference, run
from torch import Tensor, nn

from tests.zoo import ZOO, Entry
from tracker.structure import trace_structure

TOLERANCE = 1e-6


def models(choose: Callable[[Entry], bool] = lambda entry: True) -> pytest.MarkDecorator:
    params = [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if entry.slow else [])
        for name, entry in ZOO.items()
        if choose(entry)
    ]
    return pytest.mark.parametrize("name", params)


def fresh(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model = randomise(ZOO[name].build(), seed)
    return model.eval(), ZOO[name].inputs()


@functools.cache
def traced(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    """Shared by the tests, none of which changes the model."""
    model, inputs = fresh(name)
    return model, inputs, trace_structure(model, inputs)


def pick(group: Any, name: str, share: float = 0.3) -> list[int]:
    """About that share of the units, as many at a time as the group wants; at least one stays."""
    step = max(1, group.multiple_of)
    count = max(1, round(share * group.size / step)) * step
    count = min(count, (group.size - 1) // step * step)
    return sorted(random.Random(f"{name}/{group.name}").sample(range(group.size), count))


def slices_of(group: Any) -> list[Any]:
    return list(group.slices(tuple(range(group.size))))


def lies_on(group: Any, axes: Iterable[tuple[str, int]]) -> bool:
    return bool({(piece.tensor, piece.dim) for piece in slices_of(group)} & {*axes})


def equals_masked(model: nn.Module, inputs: Any, group: Any, units: list[int]) -> float:
    """How far removal is from the masked model, relative to the output."""
    pruned = run(prune_copy(model, group, units), inputs)
    return min(
        relative_difference(pruned, run(masked_copy(model, group, units, silence=silence), inputs))
        for silence in (False, True)
    )


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that tracing could disturb."""
    hooks = [
        sum(len(held) for key, held in vars(module).items() if "hooks" in key and held)
        for module in model.modules()
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    attributes = [
        {key: (type(value), value) for key, value in vars(module).items() if _plain(value)}
        for module in model.modules()
    ]
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "storages": {key: value.data_ptr() for key, value in parameters.items()},
        "gradients": {key: value.grad for key, value in parameters.items()},
        "flags": {key: value.requires_grad for key, value in parameters.items()},
        "training": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "attributes": attributes,
        "hooks": hooks,
        "rng": torch.get_rng_state(),
        "python rng": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, int | float | str | bool | None)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


# The test's own parts


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
    whole = run(copy.deepcopy(model).double(), inputs)
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
    double = run(copy.deepcopy(model).double(), inputs)
    assert all(leaf.dtype is torch.float64 for leaf in leaves(double))
    assert relative_difference(single, double) < 1e-4
    entry = ZOO[name]
    tensors = model.state_dict()
    for tensor, dim in (*entry.pinned, *entry.inexact):
        assert dim < tensors[tensor].dim()
    assert entry.expect_frozen == bool(entry.pinned) == bool(entry.words)


# The structure


@models()
def test_tracing_leaves_no_trace(name: str) -> None:
    model, inputs = fresh(name)
    model.train()
    for module in list(model.modules())[1::2]:
        module.eval()  # flags that one call of train() or eval() would not restore
    arguments = [x.clone() for x in inputs]
    before = everything(model)
    structure = trace_structure(model, inputs)
    after = everything(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert all(torch.equal(x, y) for x, y in zip(inputs, arguments, strict=True))
    assert str(structure).strip()


@models()
def test_names_are_unique_and_stable(name: str) -> None:
    model, inputs, structure = traced(name)
    names = [group.name for group in structure.groups]
    assert len(set(names)) == len(names)
    assert [group.name for group in trace_structure(model, inputs).groups] == names
    other, inputs = fresh(name, seed=1)
    if name != "boolean_mask":  # its graph follows the values
        assert [group.name for group in trace_structure(other, inputs).groups] == names


@models()
def test_removal_equals_the_masked_model(name: str) -> None:
    model, inputs, structure = traced(name)
    whole = run(copy.deepcopy(model).double(), inputs)
    wrong, effects = {}, []
    for group in structure.groups:
        units = pick(group, name) if group.prunable and group.size >= 2 else []
        if not units:
            continue
        try:
            if group.exact:
                difference = equals_masked(model, inputs, group, units)
                if not difference < TOLERANCE:
                    wrong[group.name] = f"off by {difference:.1e} without {units}"
            else:
                # Not the masked model, but a model: of the same outputs, all finite.
                pruned = leaves(run(prune_copy(model, group, units), inputs))
                if [x.shape for x in pruned] != [x.shape for x in leaves(whole)]:
                    wrong[group.name] = f"outputs of other shapes without {units}"
                elif not all(x.isfinite().all() for x in pruned):
                    wrong[group.name] = f"not finite without {units}"
        except (RuntimeError, ValueError, IndexError) as error:
            wrong[group.name] = f"does not run without {units}: {error}"
        for silence in (False, True):
            masked = run(masked_copy(model, group, units, silence=silence), inputs)
            effects.append(relative_difference(masked, whole))
    assert wrong == {}
    # Otherwise the comparison above could not tell.
    assert not effects or max(e for e in effects if e != float("inf")) > TOLERANCE


@models()
def test_slices_lie_in_the_model_and_apart(name: str) -> None:
    model, _, structure = traced(name)
    tensors = model.state_dict()
    for group in structure.groups:
        owner: dict[tuple[str, int, int], int] = {}
        for unit in range(group.size):
            pieces = list(group.slices((unit,)))
            assert pieces or not group.prunable, f"{group.name}: unit {unit} is nothing"
            for piece in pieces:
                assert piece.role in {"produces", "carries", "reads"}
                assert piece.tensor in tensors
                assert 0 <= piece.dim < tensors[piece.tensor].dim()
                assert piece.indices
                for index in piece.indices:
                    assert 0 <= index < tensors[piece.tensor].shape[piece.dim]
                    where = (piece.tensor, piece.dim, index)
                    assert owner.setdefault(where, unit) == unit, f"{group.name}: {where}"


@models()
def test_slices_together_name_nothing_twice(name: str) -> None:
    _, _, structure = traced(name)
    for group in structure.groups:
        # A tied matrix may both make a unit and read it: by role.
        named = Counter(
            (piece.tensor, piece.dim, piece.role, index)
            for piece in slices_of(group)
            for index in piece.indices
        )
        assert [where for where, times in named.items() if times > 1] == [], group.name
        apart = {
            (piece.tensor, piece.dim, piece.role, index)
            for unit in range(group.size)
            for piece in group.slices((unit,))
            for index in piece.indices
        }
        assert apart == {*named}, f"{group.name}: all at once is not each by itself"


@models(lambda entry: entry.expect_frozen)
def test_what_must_freeze_is_frozen_with_a_reason(name: str) -> None:
    _, _, structure = traced(name)
    entry = ZOO[name]
    groups = [group for group in structure.groups if lies_on(group, entry.pinned)]
    assert [group.name for group in groups if group.prunable] == []
    assert all(group.reason for group in groups)
    frozen = [f for f in structure.frozen if (f.tensor, f.dim) in entry.pinned]
    reasons = [group.reason for group in groups] + [f.reason for f in frozen]
    silent = {*entry.pinned} - {(f.tensor, f.dim) for f in frozen}
    assert silent <= {(piece.tensor, piece.dim) for group in groups for piece in slices_of(group)}
    assert any(word in reason.lower() for reason in reasons for word in entry.words), reasons


@models(lambda entry: bool(entry.inexact))
def test_what_is_not_exact_does_not_claim_to_be(name: str) -> None:
    _, _, structure = traced(name)
    for group in structure.groups:
        if group.prunable and lies_on(group, ZOO[name].inexact):
            touched = {
                (piece.tensor, piece.dim)
                for piece in slices_of(group)
                if (piece.tensor, piece.dim) in ZOO[name].inexact
            }
            assert not group.exact, f"{group.name}: {touched}"


@models(lambda entry: entry.min_coverage is not None)
def test_coverage(name: str) -> None:
    _, _, structure = traced(name)
    assert ZOO[name].min_coverage <= structure.coverage <= 1


@models()
def test_groups_that_cannot_be_pruned_say_why(name: str) -> None:
    _, _, structure = traced(name)
    assert [g.name for g in structure.groups if not g.prunable and not g.reason] == []
    assert all(f.reason and f.tensor for f in structure.frozen)


def test_kinds_are_the_field_s() -> None:
    """Of a block with a residual stream, attention and a gated MLP."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(11, 16), nn.RMSNorm(16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.gate, self.up = nn.Linear(16, 20), nn.Linear(16, 20)
            self.down, self.head = nn.Linear(20, 16), nn.Linear(16, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return self.head(x)

    found = trace_structure(Block(), torch.randint(0, 11, (2, 6)))
    kinds = {group.name: group.kind for group in found.groups}
    assert kinds["embed"] == "residual"
    assert kinds["gate"] == "neuron"
    assert {k for name, k in kinds.items() if "attention" in name} <= {"head", "head_dim"}
    conv = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1))
    kinds_of_conv = {g.kind for g in trace_structure(conv, torch.randn(1, 4, 8, 8)).groups}
    assert "group" in kinds_of_conv

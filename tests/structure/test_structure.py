"""What the structure of a model says, against removal by hand and the masked model, in float64."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import (
    copied,
    leaves,
    masked_copy,
    prune_copy,
    relative_difference,
    run,
)
from tests.structure.subjects import (
    TOLERANCE,
    equals_masked,
    everything,
    fresh,
    lies_on,
    models,
    pick,
    same,
    slices_of,
    traced,
)
from tests.zoo import ZOO
from tracker.structure import trace_structure


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
    whole = run(copied(model).double(), inputs)
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

"""Depth: layers come without a trace and go with a refit; faults tear nothing; chains of all operations hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.structure.oracle_masks import relative_difference
from tests.surgery.bits import (
    FaultAt,
    FaultError,
    equal,
    everything,
    holds_the_live,
    memory,
    weights,
)
from tests.surgery.subjects import prepared
from tracker import NeuronEngine, SurgeryError, TrackerError

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(3))


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, 3)
    )


def convnet(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 5, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(45, 3),
    )


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


TOKENS = torch.randint(11, (60, 6), generator=torch.Generator().manual_seed(4))


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> tuple[torch.optim.Adam, NeuronEngine]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    for _ in range(steps):
        train(model, x, optimizer)
    return optimizer, engine


def train(model: nn.Module, x: Tensor, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Of a copy in eval mode: nothing of the model moves."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


# Insertion


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize(
    ("build", "after"), [(mlp, "0"), (mlp, "2"), (mlp, "4"), (convnet, "0"), (convnet, "3")]
)
def test_a_layer_comes_unnoticed(build: Any, after: str, activation: Any) -> None:
    model, x = build(activation), X if build is mlp else IMAGES
    optimizer, engine = trained(model, x)
    every, old, state = output(model, x), weights(model), memory(model, optimizer)
    before, ids = everything(model, optimizer, engine), engine.track_model(model)
    known = {i for v in ids.values() for i in v}
    receipt = engine.insert_layer(after=after)
    assert receipt.promise == "exact"
    assert relative_difference(output(model, x), every) <= 1e-6
    assert (
        receipt.parameters_before
        < receipt.parameters_after
        == sum(p.numel() for p in model.parameters())
    )
    new = weights(model)
    assert all(torch.equal(new[k], v) for k, v in old.items())  # old keys, old values
    assert all(k.startswith(f"{after}.inserted.") for k in new.keys() - old.keys())
    assert {k: v for k, v in memory(model, optimizer).items() if k in state}.keys() == state.keys()
    assert holds_the_live(model, optimizer)
    assert receipt.added_ids
    assert not known & set(receipt.added_ids)
    assert {i for v in engine.track_model(model).values() for i in v} == known | set(
        receipt.added_ids
    )
    twin = copy.deepcopy(model)  # the hook that runs it is copied with it
    assert torch.equal(output(twin, x), output(model, x))
    twin.load_state_dict(new)
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)
    engine.insert_layer(after=after)
    model.train()
    inserted = model.get_submodule(f"{after}.inserted")
    start = [p.detach().clone() for p in inserted.parameters()]
    for _ in range(5):
        train(model, x, optimizer)
    moved = [bool((p != q).any()) for p, q in zip(inserted.parameters(), start, strict=True)]
    assert all(moved), moved


def test_kinds_of_inserted_layers() -> None:
    """Before a ReLU the identity on what is positive, elsewhere a residual block."""
    for activation, kind in ((nn.ReLU, "ReluIdentity"), (nn.GELU, "ResidualBlock")):
        model = mlp(activation)
        _, engine = trained(model, X)
        engine.insert_layer(after="0")
        assert type(model[0].inserted).__name__ == kind
    engine.insert_layer(after="2")
    assert engine.prune_units({"2": [1]}).promise == "masked"  # pruning goes on, through the block


def test_insertions_that_are_refused() -> None:
    model = convnet()
    optimizer, engine = trained(model, IMAGES)
    engine.insert_layer(after="0")
    before = everything(model, optimizer, engine)
    for after, why in (("0", "inserted before"), ("1", "linear or a conv"), ("nope", "no layer")):
        with pytest.raises(SurgeryError, match=why):
            engine.insert_layer(after=after)
        assert equal(everything(model, optimizer, engine), before)


def test_an_inserted_layer_can_go_again() -> None:
    """It is the identity yet: nothing is lost, and the optimizer lets its parameters go."""
    model = mlp(nn.GELU)
    optimizer, engine = trained(model, X)
    every = output(model, X)
    engine.insert_layer(after="0")
    receipt = engine.remove_layer("0.inserted", force=True)
    assert relative_difference(output(model, X), every) < 1e-6
    assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
    assert receipt.removed_ids
    assert holds_the_live(model, optimizer)
    train(model, X, optimizer)


# Removal


def bypassed(model: nn.Module, name: str) -> nn.Module:
    """A copy without the module, nothing refitted."""
    other = copy.deepcopy(model)
    where, _, child = name.rpartition(".")
    setattr(other.get_submodule(where), child, nn.Identity())
    return other


def test_a_hidden_layer_goes_and_what_reads_it_is_refitted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    batches, new = torch.randn(5, 200, 6).double(), torch.randn(500, 6).double()
    optimizer, engine = trained(model, batches[0])
    every, naive = output(model, new), output(bypassed(model, "2"), new)
    before = everything(model, optimizer, engine)
    gone = list(engine.track_model(model)["2"])
    fitted = copy.deepcopy(model)
    receipt = engine.remove_layer("2", batches=batches)
    found = output(model, new)
    assert (found - every).norm() < 0.5 * (naive - every).norm()
    assert receipt.promise == "changed"
    assert receipt.removed_ids == gone
    assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
    assert holds_the_live(model, optimizer)
    assert "explains" in str(receipt)
    # The refit is least squares of what was read on what is read now.
    with torch.no_grad():
        x = torch.tanh(fitted[1](fitted[0](batches.flatten(0, 1))))
        x, y = torch.cat((x, torch.ones(len(x), 1)), 1), fitted(batches.flatten(0, 1))
        best = y - x @ torch.linalg.lstsq(x, y).solution
        error = model(batches.flatten(0, 1)) - y
    assert best.square().sum() <= error.square().sum() <= 1.01 * best.square().sum()
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.2"])
def test_a_residual_block_goes(name: str) -> None:
    torch.manual_seed(0)
    model = Transformer().double()
    optimizer, engine = trained(model, TOKENS, steps=0)
    every, naive = output(model, TOKENS), output(bypassed(model, name), TOKENS)
    before = everything(model, optimizer, engine)
    receipt = engine.remove_layer(name, batches=TOKENS.split(20), force=True)
    assert relative_difference(output(model, TOKENS), every) < relative_difference(naive, every)
    assert receipt.parameters_after < receipt.parameters_before
    assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
    assert holds_the_live(model, optimizer)
    train(model, TOKENS, optimizer)
    model(TOKENS).sum().backward()
    engine.undo()
    assert {k: v.shape for k, v in weights(model).items()} == {
        k: v.shape for k, v in before[0].items()
    }
    assert holds_the_live(model, optimizer)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_a_norm_of_another_width_stands_in_the_way() -> None:
    """Without the layer what follows cannot run: refused, not a failure from within."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)
    )
    optimizer, engine = trained(model, X)
    before = everything(model, optimizer, engine)
    with pytest.raises(SurgeryError, match="'5' is not reached"):
        engine.remove_layer("2", force=True)
    assert equal(everything(model, optimizer, engine), before)


def test_removals_that_are_refused() -> None:
    """Too little explained, unless forced; another shape; the only layer; one that is not there."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(6, 2), nn.Identity(), nn.Linear(2, 2), Square(), nn.Linear(2, 3)
    )
    with torch.no_grad():  # (a + b)² - (a - b)² = 4ab, of which a² and b² tell nothing
        model[0].weight.copy_(torch.eye(6)[:2])
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model[2].bias.zero_()
        model[4].weight[:, 1] = -model[4].weight[:, 0]
    optimizer, engine = trained(model, X, steps=0)
    before = everything(model, optimizer, engine)
    mirrored = torch.cat((X, X * torch.tensor([-1.0, *[1.0] * 5])))
    with pytest.raises(SurgeryError, match="only 0% of what it did"):
        engine.remove_layer("2", batches=[mirrored])
    for name, why in (("nope", "no layer"), ("", "no layer"), ("4", "cannot be")):
        with pytest.raises(SurgeryError, match=why):
            engine.remove_layer(name)
        assert equal(everything(model, optimizer, engine), before), name
    engine.remove_layer("2", force=True)
    assert holds_the_live(model, optimizer)
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)


# Faults


FAULTS: dict[str, Callable[[NeuronEngine, list[int]], Any]] = {
    "prune": lambda e, i: e.prune_neurons([i[1], i[2]]),
    "merge": lambda e, i: e.merge_neurons([(i[1], i[2])]),
    "expand": lambda e, i: e.expand_layer("0", 2),
    "recycle": lambda e, i: e.recycle_neurons([i[3]]),
    "insert": lambda e, i: e.insert_layer(after="0"),
    "remove": lambda e, i: e.remove_layer("3", force=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_operation_tears_nothing(name: str) -> None:
    """Injected at each ATen operation, the fits and the trials on copies included."""
    torch.manual_seed(0)
    between = nn.BatchNorm1d(6) if name == "expand" else nn.Identity()
    model = nn.Sequential(
        nn.Linear(6, 6), between, nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    )
    optimizer, engine = trained(model, X[:16])
    model(X[:16]).sum().backward()
    _ = engine.structure
    before = everything(model, optimizer, engine)
    ids = list(engine.track_model(model)["0"])
    points = 0
    while True:
        fault = FaultAt(points + 1)
        try:
            with fault:
                FAULTS[name](engine, ids)
            if fault.left > 0:  # it never came
                break
            engine.undo()  # it came where a failure does no harm
        except (FaultError, TrackerError):
            pass
        points += 1
        assert equal(everything(model, optimizer, engine), before), f"torn at operation {points}"
    print(f"{name}: {points} injection points, nothing torn")
    assert points > 100
    assert holds_the_live(model, optimizer)
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)


# Chains


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """A small MLP or convolutional network, and inputs for it."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    activation = draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh]))
    blocks: list[nn.Module] = []
    convolution = draw(st.booleans())
    width = 2 if convolution else 5
    for _ in range(draw(st.integers(1, 3))):
        new, bias = draw(st.integers(2, 6)), draw(st.booleans())
        padding = draw(st.integers(0, 1))
        blocks.append(
            nn.Conv2d(width, new, 3, padding=padding, bias=bias)
            if convolution
            else nn.Linear(width, new, bias=bias)
        )
        if draw(st.booleans()):
            blocks.append(nn.BatchNorm2d(new) if convolution else nn.BatchNorm1d(new))
        blocks.append(activation())
        width = new
    if convolution:
        blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    x = torch.randn((9, 2, 7, 7) if convolution else (30, 5))
    return nn.Sequential(*blocks, nn.Linear(width, 2)), x


ACTIONS = ("prune", "expand", "recycle", "merge", "insert", "train", "undo")


@pytest.mark.slow
@given(
    built=networks(),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=8),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_random_chains_of_changes(
    built: tuple[nn.Sequential, Tensor], actions: list[str], data: st.DataObject
) -> None:
    """After each: outputs finite, ids unique, the optimizer in step, the receipt right, undo bit for bit."""
    model, x = built
    optimizer, engine = trained(model, x, steps=data.draw(st.integers(0, 2)))
    before: list[Any] | None = None
    for action in actions:
        ids = engine.track_model(model)
        groups = [g for g in engine.structure.groups if g.prunable and g.size > 1]
        layers = [n for g in groups for n in g.layers if n in ids]
        now = everything(model, optimizer, engine)
        receipt = None
        if action == "train":
            train(model, x, optimizer)
            before = None  # an undo now would take back more than the change
        elif action == "undo":
            if before is not None:
                engine.undo()
                assert equal(everything(model, optimizer, engine), before)
                before = None
        elif layers:
            layer = data.draw(st.sampled_from(layers))
            some = data.draw(st.permutations(list(ids[layer])))[:2]
            old = output(model, x)
            change: dict[str, Callable[[], Any]] = {
                "prune": lambda n=some[:1]: engine.prune_neurons(n),
                "expand": lambda n=layer: engine.expand_layer(n, 2),
                "recycle": lambda n=some[:1]: engine.recycle_neurons(n),
                "merge": lambda n=some: engine.merge_neurons([(n[0], n[1])]),
                "insert": lambda n=layer: engine.insert_layer(after=n),
            }
            try:
                receipt = change[action]()
            except TrackerError as error:
                assert str(error)  # noqa: PT017
                assert equal(everything(model, optimizer, engine), now)
                continue
            before = now
            assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
            if receipt.promise == "exact":
                assert relative_difference(output(model, x), old) < 1e-4
            assert action not in ("expand", "insert") or receipt.promise == "exact"
        assert copy.deepcopy(model)(x).isfinite().all()  # a copy: norms count what they see
        assert holds_the_live(model, optimizer)
        every = [i for v in engine.track_model(model).values() for i in v]
        assert len(every) == len(set(every))


def test_a_layer_that_only_the_one_inserted_behind_it_reads_stays() -> None:
    model, _, engine, x = prepared("mlp")
    engine.insert_layer("0")
    before = snapshot_of(model)
    with pytest.raises(SurgeryError, match=r"0\.inserted"):
        engine.remove_layer("0", batches=[x], force=True)
    assert snapshot_of(model) == before
    engine.undo()
    engine.remove_layer("2", batches=[x], force=True)


def snapshot_of(model: nn.Module) -> tuple[str, list[list[float]]]:
    return str(model), [t.flatten().tolist() for t in model.state_dict().values()]

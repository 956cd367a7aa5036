"""What stays takes over what goes: exactly where it can, and otherwise as closed forms say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.oracle_masks import relative_difference
from tests.surgery.bits import equal, everything, holds_the_live, memory, weights
from tracker import NeuronEngine, SurgeryError

WIDE = 10  # hidden units
A, B, DEAD, CONSTANT, DOUBLE, THIRD = range(6)


def plant(rows: Tensor, bias: Tensor | None, kind: str) -> int:
    """Make one unit superfluous by what makes it, and tell which. Units A and B stay: positive, A above B."""
    with torch.no_grad():
        unit = {"dead": DEAD, "constant": CONSTANT, "double": DOUBLE, "third": THIRD}[kind]
        rows[A].abs_().add_(0.1)
        rows[B] = rows[A] * torch.rand(rows[A].shape, generator=torch.Generator().manual_seed(1))
        if bias is not None:
            bias[A], bias[B] = 0.7, 0.3
        made = {"double": 3 * rows[A], "third": 2 * rows[A] - rows[B]}
        rows[unit] = made.get(kind, torch.zeros_like(rows[A]))
        if bias is not None:
            bias[unit] = {"dead": -1.0, "constant": 2.0, "double": 2.1, "third": 1.1}[kind]
        return unit


class Gated(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, WIDE), nn.Linear(6, WIDE)
        self.down = nn.Linear(WIDE, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Feed(nn.Module):
    """The second half of a pre-norm transformer's block."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.into, self.out = nn.Linear(6, WIDE), nn.Linear(WIDE, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.into(self.norm(x))))


class TinyGPT(nn.Module):
    """Tokens and positions, one head of causal attention, a feed-forward part, tied head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.feed, self.last = Feed(bias), nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.last(self.feed(x)))


def conv(bias: bool, padding: int = 0, flat: bool = False) -> nn.Sequential:
    if flat:
        return nn.Sequential(
            nn.Conv2d(2, WIDE, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * WIDE, 3, bias=bias)
        )
    return nn.Sequential(
        nn.Conv2d(2, WIDE, 3, bias=False),
        nn.BatchNorm2d(WIDE),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(WIDE, 5, 2, padding=padding, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


@dataclass(frozen=True)
class Case:
    build: Callable[[bool], nn.Module]
    inputs: Callable[[], Tensor]
    layer: str
    kinds: tuple[str, ...] = ("dead", "constant", "double", "third")


CASES = {
    "mlp": Case(
        lambda bias: nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Linear(WIDE, 3, bias=bias)),
        lambda: torch.rand(200, 6),
        "0",
    ),
    "conv": Case(conv, lambda: torch.rand(20, 2, 9, 9), "0"),
    "padded": Case(lambda bias: conv(bias, padding=1), lambda: torch.rand(20, 2, 9, 9), "0"),
    "flat": Case(lambda bias: conv(bias, flat=True), lambda: torch.rand(200, 2, 4, 4), "0"),
    "gated": Case(Gated, lambda: torch.randn(200, 6), "up"),
    "feed": Case(Feed, lambda: torch.randn(40, 5, 6), "into", ("dead", "constant", "double")),
    "gpt": Case(
        TinyGPT, lambda: torch.randint(11, (40, 7)), "feed.into", ("dead", "constant", "double")
    ),
}


def planted(name: str, kind: str, bias: bool) -> tuple[nn.Module, int]:
    """A model of the case with one superfluous unit, which gets a loud voice: its absence would be heard."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build(bias).eval()
    with torch.no_grad():
        model(case.inputs())  # lazy layers
        layer: Any = model.get_submodule(case.layer)
        unit = plant(layer.weight, layer.bias, kind)
        if name in ("conv", "padded"):
            norm: Any = model[1]  # type: ignore[index]
            norm.bias[[A, B]] = torch.tensor([0.7, 0.3])
            norm.bias[unit] = {"dead": -1.0, "constant": 2.0, "double": 2.1, "third": 1.1}[kind]
        if name == "gated":
            model.gate.weight[[A, B, unit]] = model.gate.weight[A].clone()  # type: ignore[union-attr,index]
            model.gate.bias[[A, B, unit]] = 0.5  # type: ignore[union-attr]
            if kind == "constant":
                model.gate.weight[unit] = 0.0  # type: ignore[union-attr,index]
            if kind == "dead":
                model.up.bias[unit] = 0.0  # type: ignore[union-attr]
        if name in ("feed", "gpt"):
            if kind == "dead":
                layer.bias[unit] = 0.0
            if kind == "double":  # GELU does not scale
                layer.weight[unit], layer.bias[unit] = layer.weight[A], layer.bias[A]
    return model.double(), unit


def fresh(name: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    x = CASES[name].inputs()
    return x.double() if x.is_floating_point() else x


def apart(model: nn.Module, before: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_difference(model(x), before(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, c in CASES.items() for k in c.kinds])
def test_superfluous_units_go_without_a_trace(name: str, kind: str, bias: bool) -> None:
    model, unit = planted(name, kind, bias)
    before = copy.deepcopy(model)
    engine = NeuronEngine()
    ids = engine.track_model(model, name, fresh(name, 1))
    engine.calibrate([fresh(name, 2), fresh(name, 3)])
    receipt = engine.prune_neurons([ids[CASES[name].layer][unit]])
    x = fresh(name, 4)
    difference = apart(model, before, x)
    assert receipt.parameters_after < receipt.parameters_before
    if kind == "constant" and (not bias or name == "padded"):
        assert receipt.promise == "changed"  # nothing holds a constant, or not near the border
        assert receipt.output_difference > 1e-6
        assert difference > 1e-6
    else:
        assert receipt.promise == "exact", receipt
        assert receipt.output_difference <= 1e-6
        assert difference <= 1e-6


@pytest.mark.parametrize("kind", ["dead", "constant", "double"])
def test_the_promise_does_not_lean_on_the_trial(kind: str) -> None:
    """Zeros are padded around a constant: that is known without running anything."""
    model, unit = planted("padded", kind, True)
    engine = NeuronEngine()
    engine.track_model(model, "padded", fresh("padded", 1))
    receipt = engine.prune_neurons({"0": [unit]}, verify=False)
    assert receipt.output_difference is None
    assert receipt.promise == ("changed" if kind == "constant" else "exact")


@pytest.mark.parametrize("name", ["mlp", "conv", "gated"])
def test_several_superfluous_units_at_once(name: str) -> None:
    """What a unit goes into may not go itself: of two copies and their original, one stays."""
    model, _ = planted(name, "third", True)
    case = CASES[name]
    layers = [model.up, model.gate] if name == "gated" else [model.get_submodule(case.layer)]
    with torch.no_grad():
        for layer in [*layers, *([model[1]] if name == "conv" else [])]:
            for key in ("weight", "bias"):
                value = getattr(layer, key)
                if value is not None:
                    value[DOUBLE], value[DEAD] = value[A], value[A]
    before = copy.deepcopy(model)
    engine = NeuronEngine()
    ids = engine.track_model(model, name, fresh(name, 1))
    engine.calibrate([fresh(name, 2), fresh(name, 3)])
    receipt = engine.prune_neurons([ids[case.layer][u] for u in (A, DOUBLE, THIRD)])
    x = fresh(name, 4)
    assert receipt.promise == "exact"
    assert apart(model, before, x) <= 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_few_observations_prove_nothing(rows: int) -> None:
    """One row makes every unit a constant, two rows put any two units on a line."""
    torch.manual_seed(0)
    for change in ("prune", "merge"):
        model = nn.Sequential(nn.Linear(6, WIDE), nn.Tanh(), nn.Linear(WIDE, 3)).double()
        engine = NeuronEngine()
        a, b = engine.track_model(model, "m", torch.randn(rows, 6).double())["0"][:2]
        receipt = engine.prune_neurons([a]) if change == "prune" else engine.merge_neurons([(a, b)])
        assert receipt.promise == "changed"


# Closed forms


def observed(x: Tensor) -> np.ndarray:
    """Rows of features, of (n, features) or (n, channels, height, width)."""
    return np.asarray(x.detach().movedim(1, -1).flatten(0, -2).numpy(), dtype=np.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convolution", [False, True])
def test_compensation_is_ridge_least_squares(convolution: bool, bias: bool) -> None:
    torch.manual_seed(3)
    model: Any = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=bias))
        if convolution
        else nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4, bias=bias))
    )
    model = model.double()
    batches = [
        torch.randn(16, 3, 7, 7).double() if convolution else torch.randn(150, 5).double()
        for _ in range(3)
    ]
    gone, kept = [1, 4, 6], [0, 2, 3, 5, 7]
    h = np.concatenate([observed(model[1](model[0](x))) for x in batches])
    weight = np.moveaxis(model[2].weight.detach().numpy(), 1, -1)
    mean = h.mean(0) if bias else np.zeros(8)
    moments = (h - mean).T @ (h - mean) / len(h)
    ridge = 1e-4 * np.trace(moments) / 8
    mixing = np.linalg.solve(
        moments[np.ix_(kept, kept)] + ridge * np.eye(5), moments[np.ix_(kept, gone)]
    ).T
    expected = weight[..., kept] + weight[..., gone] @ mixing
    target = [model(x).detach() for x in batches]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked[2].weight[:, gone] = 0

    def error(network: nn.Module) -> float:
        pairs = zip(batches, target, strict=True)
        return sum(float((network(x) - y).square().sum().detach()) for x, y in pairs)

    engine = NeuronEngine()
    engine.track_model(model, "two layers", batches[0][:8])
    engine.calibrate(batches)
    old_bias = model[2].bias.detach().numpy().copy() if bias else None
    receipt = engine.prune_neurons({"0": gone}, compensate=True)
    assert receipt.promise == "changed"
    found = np.moveaxis(model[2].weight.detach().numpy(), 1, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if bias:
        constant = weight[..., gone] @ (mean[gone] - mixing @ mean[kept])
        constant = old_bias + constant.reshape(4, -1).sum(1)
        np.testing.assert_allclose(model[2].bias.detach().numpy(), constant, rtol=1e-4, atol=1e-8)
    best = error(model)
    assert best < 0.9 * error(masked)
    if not convolution:  # taps of a convolution are refitted with one mixing, not one by one
        for seed in range(50):
            other = copy.deepcopy(model)
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in other[2].parameters():
                    p += 1e-2 * p.abs().mean() * torch.randn_like(p)
            assert best <= error(other)


def test_calibration_batches_may_be_of_any_size() -> None:
    """One pass over parts of the data is one pass over all of them."""
    torch.manual_seed(0)
    data = torch.randn(120, 5).double()
    results = []
    for sizes in ([120], [1, 7, 50, 62], [40, 40, 40]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        engine = NeuronEngine()
        engine.track_model(model, "m", data[:4])
        engine.calibrate(data.split(sizes))
        engine.prune_neurons({"0": [0, 5]})
        results.append(model(data).detach())
    assert relative_difference(results[1], results[0]) < 1e-9
    assert relative_difference(results[2], results[0]) < 1e-9


# Optimizers


def stepped(model: nn.Module, x: Tensor, kind: Any = torch.optim.Adam) -> torch.optim.Optimizer:
    """An optimizer in mid-training."""
    optimizer = kind(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_moments_grow_as_the_gradients_do() -> None:
    model, _ = planted("mlp", "third", True)
    x = fresh("mlp", 5)
    optimizer = stepped(model, x)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.calibrate([x])
    before, old = memory(model, optimizer), weights(model)
    kept = [0, 1, 2, 3, 4, 5, 6, 8]
    engine.prune_neurons({"0": [7, 9]})
    after, new = memory(model, optimizer), weights(model)
    r = new["2.weight"].norm(dim=0) / old["2.weight"][:, kept].norm(dim=0)
    live = old["2.weight"][:, kept].norm(dim=0) > 0
    assert (r[live] - 1).abs().max() > 1e-3  # there is something to see
    for key, shape in (("0.weight", (-1, 1)), ("0.bias", (-1,))):
        for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = before[key][moment][kept] * (r**power).view(shape)
            torch.testing.assert_close(after[key][moment], expected, rtol=1e-9, atol=0)
        assert after[key]["step"] == before[key]["step"]
    for key in ("2.weight", "2.bias"):
        assert not after[key]["exp_avg"].any()
        assert after[key]["exp_avg_sq"].any()
    assert torch.equal(after["2.weight"]["exp_avg_sq"], before["2.weight"]["exp_avg_sq"][:, kept])
    assert holds_the_live(model, optimizer)


def test_a_dead_unit_goes_and_no_bit_of_the_others_changes() -> None:
    model, unit = planted("mlp", "dead", True)
    x = fresh("mlp", 5)
    optimizer = stepped(model, x)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.calibrate([x])
    before, old = memory(model, optimizer), weights(model)
    assert engine.prune_neurons({"0": [unit]}).promise == "exact"
    kept = [i for i in range(WIDE) if i != unit]
    parts: dict[str, Any] = {"0.weight": kept, "0.bias": kept, "2.weight": (slice(None), kept)}
    for key, value in weights(model).items():
        assert torch.equal(value, old[key][parts.get(key, slice(None))])
    for key, state in memory(model, optimizer).items():
        for name, value in state.items():
            part = before[key][name] if name == "step" else before[key][name][parts.get(key, ...)]
            assert torch.equal(value, part)


# Merging


@pytest.mark.parametrize("name", ["mlp", "conv", "flat", "gated"])
def test_copies_merge_exactly(name: str) -> None:
    model, unit = planted(name, "double", False)
    before = copy.deepcopy(model)
    engine = NeuronEngine()
    ids = engine.track_model(model, name, fresh(name, 1))[CASES[name].layer]
    keep, drop = ids[A], ids[unit]
    receipt = engine.merge_neurons([(keep, drop)])
    assert receipt.promise == "exact", receipt
    assert drop in receipt.removed_ids
    ids = engine.track_model(model)[CASES[name].layer]
    assert keep in ids
    assert drop not in ids
    assert apart(model, before, fresh(name, 4)) <= 1e-6


def affine() -> Any:
    """Units 1 = 2·unit 0 + 3 and 2 = unit 1 / 2 + 1, all positive where inputs are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[0].abs_()
        model[0].bias[0] = 0.2
        model[0].weight[1], model[0].bias[1] = 2 * model[0].weight[0], 2 * model[0].bias[0] + 3
        model[0].weight[2], model[0].bias[2] = model[0].weight[1] / 2, model[0].bias[1] / 2 + 1
    return model


def test_affine_units_merge_exactly_and_in_chains() -> None:
    x, y = torch.rand(100, 4).double(), torch.rand(100, 4).double()
    for pairs in ([(0, 1)], [(0, 1), (1, 2)], [(2, 0)], [(1, 0), (2, 1)], [(1, 0), (1, 2)]):
        model = affine()
        before = copy.deepcopy(model)
        engine = NeuronEngine()
        ids = list(engine.track_model(model, "m", x)["0"])
        receipt = engine.merge_neurons([(ids[a], ids[b]) for a, b in pairs])
        assert receipt.promise == "exact"
        assert receipt.removed_ids == sorted(ids[b] for _, b in pairs)
        assert model[0].out_features == 6 - len(pairs)
        assert apart(model, before, y) <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_merge_is_the_best_fit(bias: bool) -> None:
    """For units that are only alike: slope and offset are those of a regression, through 0 without a bias."""
    torch.manual_seed(0)
    x = torch.randn(300, 4).double()
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=bias)).double()
    h = model[1](model[0](x)).detach().numpy()
    slope, offset = np.polyfit(h[:, 4], h[:, 2], 1)
    if not bias:
        slope, offset = float(h[:, 4] @ h[:, 2] / (h[:, 4] @ h[:, 4])), 0.0
    old = weights(model)
    engine = NeuronEngine()
    ids = engine.track_model(model, "m", x)["0"]
    assert engine.merge_neurons([(ids[4], ids[2])]).promise == "changed"
    column = old["2.weight"][:, 4] + slope * old["2.weight"][:, 2]
    torch.testing.assert_close(model[2].weight[:, 3].detach(), column, rtol=1e-9, atol=1e-12)
    if bias:
        constant = old["2.bias"] + offset * old["2.weight"][:, 2]
        torch.testing.assert_close(model[2].bias.detach(), constant)


@pytest.mark.parametrize(
    "pairs",
    [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 0)], [(0, 1), (2, 1)], [(3, 3)], [], [(0, "2")]],
)
def test_what_cannot_be_merged_is_refused(pairs: list[Any]) -> None:
    model, x = affine(), torch.rand(50, 4).double()
    optimizer = stepped(model, x)
    engine = NeuronEngine()
    ids = engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    before = everything(model, optimizer, engine)
    named = [(ids["0"][a], ids["2"][0] if b == "2" else ids["0"][b]) for a, b in pairs]
    with pytest.raises(SurgeryError, match=r"."):
        engine.merge_neurons(named)
    assert equal(everything(model, optimizer, engine), before)

"""Growth: nobody notices at first, everything can be taken back, and what is new learns at a sound pace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import copied, leaves, randomise, relative_difference
from tests.surgery.bits import AGE, equal, everything, held, holds_the_live, memory, weights
from tests.zoo import ZOO
from tracker import NeuronEngine, SurgeryError, UnknownNeuronError, VerificationError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(3))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)
    )


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 3),
    )


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
}


def trained(
    model: nn.Module, x: Tensor, name: str = "Adam", steps: int = 3, lr: float = 1e-3
) -> tuple[Any, NeuronEngine]:
    """An optimizer in mid-training, and an engine that knows it."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=lr, **options)
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    for _ in range(steps):
        train(model, x, optimizer)
    return optimizer, engine


def train(model: nn.Module, x: Tensor, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = (model(x) - Y[: len(x)]).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Of a copy in eval mode: nothing of the model moves."""
    with torch.no_grad():
        return [t.detach() for t in leaves(copied(model).eval()(*inputs))]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * e.slow) for n, e in ZOO.items()]
)
def test_every_layer_of_the_zoo_grows_unnoticed_or_not_at_all(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    randomise(model, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    engine = NeuronEngine()
    ids = engine.track_model(model, name, inputs)
    engine.attach_optimizer(optimizer)
    layers = list(ids)
    for layer in layers[:: 7 if name == "resnet18" else 1]:
        every, known = output(model, inputs), {i for v in ids.values() for i in v}
        before = everything(model, optimizer, engine)
        sizes = sum(p.numel() for p in model.parameters())
        width = len(ids[layer])
        for count in (1, 2, 3, 4, 5, 6, 8, 12):
            try:
                receipt = engine.expand_layer(layer, count)
            except (SurgeryError, VerificationError) as error:
                assert str(error), layer  # noqa: PT017
                assert equal(everything(model, optimizer, engine), before), layer
                continue
            assert relative_difference(output(model, inputs), every) <= 1e-6, layer
            assert receipt.promise == "exact"
            assert receipt.parameters_before == sizes < receipt.parameters_after
            assert receipt.parameters_after == sum(p.numel() for p in model.parameters())
            assert len(ids[layer]) == width  # what was told stays
            ids = engine.track_model(model)
            assert len(ids[layer]) == width + count
            assert len(receipt.added_ids) == len(set(receipt.added_ids)) >= count
            assert not known & set(receipt.added_ids)
            assert {i for v in ids.values() for i in v} == known | set(receipt.added_ids)
            assert holds_the_live(model, optimizer)
            sum(t.float().sum() for t in leaves(model(*inputs)) if t.requires_grad).backward()
            optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())
            break


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_batchnorm", "conv_flatten", "conv_bn", "resnet_blocks"]
)
def test_the_usual_layers_do_grow(name: str) -> None:
    """All that make a hidden width, in one go, and in training mode too where no batch statistics interfere."""
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    engine = NeuronEngine()
    engine.track_model(model, name, inputs)
    every = output(model, inputs)
    hidden = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
    assert hidden
    for layer in hidden:
        width = len(engine.track_model(model)[layer])
        assert engine.expand_layer(layer, 3).promise == "exact"
        assert len(engine.track_model(model)[layer]) == width + 3
    assert relative_difference(output(model, inputs), every) <= 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, convnet])
def test_what_was_added_can_be_pruned_without_a_trace(build: Any, name: str) -> None:
    model, x = build(), X if build is mlp else IMAGES
    optimizer, engine = trained(model, x, name)
    for layer in ("0", "2" if build is mlp else "3"):
        old, state = weights(model), memory(model, optimizer, age=False)
        ids = held(engine.track_model(model))
        receipt = engine.expand_layer(layer, 3)
        assert holds_the_live(model, optimizer)
        new = memory(model, optimizer)
        assert (AGE in new[f"{layer}.weight"]) == (name != "SGD momentum")
        engine.prune_neurons(
            [i for i in receipt.added_ids if engine.get_neuron_info(i)[0] == layer],
            compensate=False,
        )
        assert equal(weights(model), old)
        assert equal(memory(model, optimizer, age=False), state)
        assert held(engine.track_model(model)) == ids
        assert holds_the_live(model, optimizer)


@pytest.mark.parametrize("operation", ["expand", "recycle", "merge", "prune"])
def test_undo_gives_back_every_bit(operation: str) -> None:
    for build, x in ((mlp, X), (convnet, IMAGES)):
        model = build()
        optimizer, engine = trained(model, x)
        model(x).sum().backward()
        before = everything(model, optimizer, engine)
        ids = engine.track_model(model)["0"]
        change = {
            "expand": lambda e=engine: e.expand_layer("0", 2),
            "recycle": lambda e=engine, i=ids: e.recycle_neurons([i[1], i[2]]),
            "merge": lambda e=engine, i=ids: e.merge_neurons([(i[1], i[2])]),
            "prune": lambda e=engine, i=ids: e.prune_neurons([i[1], i[2]]),
        }[operation]
        change()
        assert not equal(everything(model, optimizer, engine), before)
        assert holds_the_live(model, optimizer)
        engine.undo()
        assert equal(everything(model, optimizer, engine), before)


def test_undo_after_a_step_gives_back_what_the_optimizer_remembered() -> None:
    """Of all that the change touched: moments and the step count that they belong to."""
    model = mlp()
    optimizer, engine = trained(model, X)
    old, state = weights(model), memory(model, optimizer)
    engine.expand_layer("0", 2)
    train(model, X, optimizer)
    engine.undo()
    for key in ("0.weight", "0.bias", "2.weight"):
        assert torch.equal(weights(model)[key], old[key])
        assert equal(memory(model, optimizer)[key], state[key])
    train(model, X, optimizer)
    assert holds_the_live(model, optimizer)


@pytest.mark.parametrize(
    ("layer", "count", "why"),
    [
        ("0", 0, "1 neuron or more"),
        ("0", -1, "1 neuron"),
        ("0", True, "1 neuron"),
        ("5", 1, "output"),
    ],
)
def test_refusals_name_their_reason(layer: str, count: Any, why: str) -> None:
    model = mlp()
    optimizer, engine = trained(model, X)
    before = everything(model, optimizer, engine)
    with pytest.raises(SurgeryError, match=why):
        engine.expand_layer(layer, count)
    assert equal(everything(model, optimizer, engine), before)


# What is new learns


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("build", [mlp, convnet])
def test_new_units_come_alive(build: Any, name: str) -> None:
    """Two hundred steps later both what makes them and what reads them has moved, and the loss is lower."""
    model, x = build(), X if build is mlp else IMAGES
    optimizer, engine = trained(model, x, name, lr=1e-2)
    engine.expand_layer("0", 4)
    into, out = model[0].weight[-4:].detach().clone(), model[2 if build is mlp else 3].weight
    losses = [train(model, x, optimizer) for _ in range(200)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]
    moved = (model[0].weight[-4:] - into).detach().flatten(1).norm(dim=1)
    heard = out[:, -4:].detach().transpose(0, 1).flatten(1).norm(dim=1)
    assert (heard > 1e-3).all()
    assert (moved > 1e-3).sum() >= 3  # a ReLU may be silent on all of 16 rows
    assert holds_the_live(model, optimizer)


@pytest.mark.parametrize("name", ["Adam", "AdamW fused", "AdamW foreach"])
def test_first_steps_of_new_slots_are_no_larger_than_the_rate(name: str) -> None:
    """Moments of zero under an old step count would move them several times as far."""
    model = mlp()
    lr = 1e-3
    optimizer, engine = trained(model, X, name, steps=1500, lr=lr)
    engine.expand_layer("0", 4)
    for step in range(60):
        before = model[2].weight[:, -4:].detach().clone()
        train(model, X, optimizer)
        moved = (model[2].weight[:, -4:].detach() - before).abs().max()
        assert 0 < moved <= 1.5 * lr, step
    assert float(optimizer.state[model[2].weight]["step"]) == 1560


def both_step(
    model: nn.Module, optimizer: Any, weight: Tensor, twin: Any, alone: Tensor, draw: Any
) -> tuple[Tensor, Tensor]:
    """How far a weight of the model, and one that is alone, go along the same random gradients."""
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    assert weight.grad is not None
    alone.grad = weight.grad.clone()
    before = weight.detach().clone(), alone.detach().clone()
    optimizer.step()
    twin.step()
    return weight.detach() - before[0], alone.detach() - before[1]


@pytest.mark.parametrize("steps", [20, 1500])
def test_new_slots_step_as_adam_does_at_their_age(steps: int) -> None:
    """Where they are read: whatever the optimizer's own count is, as Adam on the new slots alone would, warmed up."""
    model, lr = mlp(), 1e-3
    optimizer, engine = trained(model, X, steps=steps, lr=lr)
    engine.expand_layer("0", 4)
    engine.expand_layer("2", 2)  # slots of two dimensions, which cross
    weight, draw = model[2].weight, torch.Generator().manual_seed(0)
    alone = nn.Parameter(weight.detach().clone())
    twin = torch.optim.Adam([alone], lr=lr)
    for step in range(130):
        moved, expected = both_step(model, optimizer, weight, twin, alone, draw)
        expected *= min((step + 1) / 100, 1.0)
        assert torch.allclose(moved[:-2, -4:], expected[:-2, -4:], rtol=1e-2, atol=1e-6), step


@pytest.mark.parametrize("steps", [20, 1500])
@pytest.mark.parametrize("grown", [(), ("0",)])  # before it: columns of the same weight
def test_what_makes_a_new_unit_steps_as_after_a_few_typical_gradients(
    steps: int, grown: tuple[str, ...]
) -> None:
    """As Adam would that had seen 30 gradients of the size of the others', or as many as it has counted."""
    model, lr = mlp(), 1e-3
    optimizer, engine = trained(model, X, steps=steps, lr=lr)
    for layer in grown:
        engine.expand_layer(layer, 3)
    weight, draw = model[2].weight, torch.Generator().manual_seed(0)
    others = optimizer.state[weight]["exp_avg_sq"].mean(0) / (1 - 0.999**steps)
    engine.expand_layer("2", 2)
    age, mature = min(steps, 30), weight.shape[1] - 3 * len(grown)
    alone = nn.Parameter(weight.detach().clone())
    twin = torch.optim.Adam([alone], lr=lr)
    twin.state[alone] = {
        "step": torch.tensor(float(age)),
        "exp_avg": torch.zeros_like(alone),
        "exp_avg_sq": (others * (1 - 0.999**age)).expand_as(alone).clone(),
    }
    for step in range(130):
        moved, expected = both_step(model, optimizer, weight, twin, alone, draw)
        moved, expected = moved[-2:], expected * min((age + step + 1) / 100, 1.0)
        assert torch.allclose(moved[:, :mature], expected[-2:, :mature], rtol=2e-2, atol=1e-6), step
        assert (moved[:, mature:].abs() <= 1.5 * lr).all(), step  # where both are new


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta"])
def test_what_makes_a_new_unit_steps_no_further_than_the_others(kind: str) -> None:
    """Of optimizers that correct no bias, or another one: second moments of zero would let it leap."""
    model = mlp()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    engine = NeuronEngine()
    engine.track_model(model, "m", X)
    engine.attach_optimizer(optimizer)
    for _ in range(200):
        train(model, X, optimizer)
    engine.expand_layer("0", 3)
    weight, draw = model[0].weight, torch.Generator().manual_seed(0)
    scale = float((optimizer.state[weight].get("square_avg", torch.ones(1))).mean()) ** 0.5
    for step in range(20):
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=draw)
        old = weight.detach().clone()
        optimizer.step()
        moved = (weight.detach() - old).abs().mean(1)
        assert moved[-3:].max() <= 2.5 * moved[:-3].mean(), step


def test_growth_at_a_high_rate_does_not_silence_what_is_new() -> None:
    """While they are hardly read, gradients are small: Adam must not step along them as far as along the others'."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=draw)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "m", x[:4])
    engine.attach_optimizer(optimizer)
    y = teacher(x).detach()
    moves = []
    for step in range(160):
        if step == 100:
            engine.expand_layer("0", 30)
        old = model[0].weight.detach().clone()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if step > 100:
            moves.append((model[0].weight.detach() - old).abs().mean(1))
    moved = torch.stack(moves).mean(0)
    assert moved[6:].mean() <= moved[:6].mean()


def test_corrections_end_where_they_are_negligible() -> None:
    """With β₂ = 0.95 after the warm-up; nothing of them is left in the state."""
    model = mlp()
    optimizer, engine = trained(model, X, "Adam")
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    engine.expand_layer("0", 2)
    for _ in range(120):
        train(model, X, optimizer)
    assert all(AGE not in state for state in optimizer.state.values())


def test_old_slots_step_as_if_nothing_had_come() -> None:
    """The first step after a growth: the old slots' values are those of a twin that did not grow."""
    for name in OPTIMIZERS:
        model = mlp()
        optimizer, engine = trained(model, X, name)
        twin = copied(model)
        kind, options = OPTIMIZERS[name]
        other = kind(twin.parameters(), lr=1e-3, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        engine.expand_layer("0", 2)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel()))
            p.grad = torch.zeros_like(p)
            p.grad[tuple(slice(n) for n in q.shape)] = q.grad
        optimizer.step()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p[tuple(slice(n) for n in q.shape)], q), name


def test_ages_are_saved_and_loaded_and_go_on(tmp_path: Any) -> None:
    """A resumed run takes the very steps of the one that went on."""
    model = mlp()
    optimizer, engine = trained(model, X, steps=1500)
    engine.expand_layer("0", 4)
    for _ in range(5):
        train(model, X, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copied(model)
    resumed = torch.optim.Adam(twin.parameters(), lr=1e-3)
    again = NeuronEngine()
    again.track_model(twin, "resumed", X)
    again.attach_optimizer(resumed)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    age = optimizer.state[model[0].weight][AGE]
    assert age.shape == model[0].weight.shape
    assert float(age.min()) == 30 + 5  # it makes the new units
    assert float(optimizer.state[model[2].weight][AGE].min()) == 5  # it reads them
    assert torch.equal(resumed.state[twin[0].weight][AGE], age)
    for _ in range(5):
        train(model, X, optimizer)
        train(twin, X, resumed)
    assert equal(weights(twin), weights(model))


def test_ages_count_on_in_half_precision() -> None:
    """Loading gives state the parameter's dtype, in which 256 + 1 is 256."""
    model = mlp().bfloat16()
    optimizer, engine = trained(model, X.bfloat16(), steps=1500)
    engine.expand_layer("0", 2)
    train(model, X.bfloat16(), optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(300):
        train(model, X.bfloat16(), optimizer)
    assert float(optimizer.state[model[2].weight][AGE].min()) == 301


def test_an_optimizer_that_began_later_needs_no_ages() -> None:
    """No step was taken yet: all slots are of one age."""
    model = mlp()
    optimizer, engine = trained(model, X, steps=0)
    engine.expand_layer("0", 2)
    engine.recycle_neurons([engine.track_model(model)["2"][0]])
    train(model, X, optimizer)
    assert all(AGE not in state for state in optimizer.state.values())
    assert holds_the_live(model, optimizer)


def test_directions_by_which_the_loss_falls() -> None:
    """New units along the gradient gain more in a few steps than random ones."""

    def gained(directed: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))
        teacher = torch.randn(6, 3)
        x = torch.randn(256, 6)
        y = torch.tanh(x @ teacher)

        def loss(out: Any, batch: Any) -> Tensor:
            return (out - batch[1]).square().mean()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = NeuronEngine()
        engine.track_model(model, "m", x)
        engine.attach_optimizer(optimizer)
        how: dict[str, Any] = {"batches": [(x, y)], "loss": loss} if directed else {}
        engine.expand_layer("0", 2, **how)
        for p in [*model[0].parameters(), model[2].bias]:
            p.requires_grad_(False)  # what the new units alone are good for
        for _ in range(20):
            optimizer.zero_grad()
            loss(model(x), (x, y)).backward()
            model[2].weight.grad[:, :3] = 0
            optimizer.step()
        return float(loss(model(x), (x, y)).detach())

    assert gained(True) < gained(False)


# Recycling


@pytest.mark.parametrize("build", [mlp, convnet])
def test_dead_units_get_a_new_start(build: Any) -> None:
    model, x = build(), X if build is mlp else IMAGES
    optimizer, engine = trained(model, x)
    with torch.no_grad():
        if build is mlp:
            model[0].weight[[1, 4]], model[0].bias[[1, 4]] = 0.0, -1.0
        else:
            model[1].weight[[1, 4]], model[1].bias[[1, 4]] = 0.0, -1.0
    model.eval()
    ids = engine.track_model(model)["0"]
    dead = [ids[1], ids[4]]
    every, old = output(model, (x,)), weights(model)
    engine.calibrate([x])
    receipt = engine.recycle_neurons(dead)
    assert receipt.promise == "exact"
    assert relative_difference(output(model, (x,)), every) <= 1e-6
    assert set(dead) <= set(receipt.removed_ids)
    ids = engine.track_model(model)["0"]
    assert len(ids) == len(old["0.weight"])
    assert [ids[1], ids[4]] == [i for i in receipt.added_ids if i in ids]
    for neuron in dead:
        with pytest.raises(UnknownNeuronError, match="has left the network: removed by recycle"):
            engine.get_neuron_info(neuron)
    reads = model[2 if build is mlp else 3].weight
    assert not reads[:, [1, 4]].any()
    assert (model[0].weight[[1, 4]].flatten(1).norm(dim=1) > 0.05).all()
    others = [i for i in range(len(ids)) if i not in (1, 4)]
    assert torch.equal(model[0].weight[others], old["0.weight"][others])
    assert torch.equal(reads[:, others], old["2.weight" if build is mlp else "3.weight"][:, others])
    assert holds_the_live(model, optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[model[0].weight][name][[1, 4]].any()
    if build is convnet:
        assert (model[1].running_var[[1, 4]] > 0).all()
    model.train()
    for _ in range(100):
        train(model, x, optimizer)
    assert (reads[:, [1, 4]].abs() > 0).any(0).all()


def test_constant_units_are_taken_over_by_the_bias() -> None:
    model = mlp().eval()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 1.5
    _, engine = trained(model, X, steps=0)
    every = output(model, (X,))
    engine.calibrate([X])
    assert engine.recycle_neurons({"0": [2]}).promise == "exact"
    assert relative_difference(output(model, (X,)), every) <= 1e-6


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_stays(last: bool) -> None:
    """A 1×1 kernel, contiguous in both formats, does not turn the model to the other one."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
    model.append(nn.Conv2d(5, 2, 1))
    if last:
        model = model.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    engine = NeuronEngine()
    engine.track_model(model, "m", IMAGES)
    engine.expand_layer("0", 2)
    engine.prune_neurons({"0": [6, 7]}, compensate=False)
    engine.expand_layer("2", 1)
    engine.prune_neurons({"2": [5]}, compensate=False)
    if not last:
        assert [p.stride() for p in model.parameters()] == strides
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) == last for p in kernels)


@pytest.mark.parametrize(
    "name", ["conv_bn", "resnet_blocks", "depthwise_separable", "conv_flatten"]
)
def test_channels_last_has_the_same_structure(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    groups = []
    for layout in (torch.contiguous_format, torch.channels_last):
        engine = NeuronEngine()
        engine.track_model(model.to(memory_format=layout), name, inputs)
        groups.append({g.name: g.size for g in engine.structure.groups if g.prunable})
    assert groups[0] == groups[1]
    every = output(model, inputs)
    layer = engine.structure.groups[-1].layers[0]
    assert engine.expand_layer(layer, 2).promise == "exact"
    assert relative_difference(output(model, inputs), every) <= 1e-6

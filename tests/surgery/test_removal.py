"""Removal in place: equal to the masked original, all or nothing, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.oracle_masks import masked_copy, randomise, relative_difference
from tests.surgery.bits import equal
from tests.zoo import ZOO
from tracker import NeuronEngine, SurgeryError, UnknownNeuronError, VerificationError


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(optimizer: Callable[..., Any] = torch.optim.Adam, **options: Any) -> tuple[Any, ...]:
    """A model, its optimizer and its engine in mid-training, correlation observed."""
    model = convnet()
    optimizer = optimizer(model.parameters(), **{"lr": 1e-2, **options})
    engine = NeuronEngine()
    engine.track_model(model, "m", X)
    engine.attach_optimizer(optimizer)
    engine.start_tracking(enable_correlation_analysis=True)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, engine


def snapshot(model: nn.Module, optimizer: Any, engine: NeuronEngine) -> list[Any]:
    """Everything that a failed change must leave as it was, as comparable values."""
    state = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        for p in model.parameters()
        if p in optimizer.state
    ]
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [id(p) for p in model.parameters()],
        state,
        str(model),
        {k: list(v) for k, v in engine.track_model(model).items()},
        engine.get_dataset_statistics(),
        engine.find_redundant_neurons(0.0),
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * e.slow) for n, e in ZOO.items()]
)
def test_equal_to_the_masked_original(name: str) -> None:
    """Every prunable group of every model of the zoo, one after the other on the shrinking model."""
    torch.manual_seed(0)
    model = ZOO[name].build().double().eval()
    randomise(model, 0)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in ZOO[name].inputs())
    engine = NeuronEngine()
    engine.track_model(model, name, inputs)
    for group in [g.name for g in engine.structure.groups if g.prunable]:
        found = {g.name: g for g in engine.structure.groups}.get(group)
        if found is None or not found.prunable:
            continue
        units = list(range(0, found.size - 1, 3))
        expected = [masked_copy(model, found, units, silence=s)(*inputs) for s in (False, True)]
        receipt = engine.prune_units({group: units})
        output = model(*inputs)
        if found.exact:
            assert receipt.promise == "masked"
            assert receipt.output_difference < 1e-9
            with torch.no_grad():
                assert min(relative_difference(output, e) for e in expected) < 1e-9
        else:
            assert receipt.promise == "changed"
        leaves = [
            t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad
        ]
        sum(t.sum() for t in leaves).backward()
        for p in model.parameters():
            assert p.grad is None or p.grad.shape == p.shape
        model.zero_grad()


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_of_survivors_is_the_dense_step(name: str) -> None:
    """Bit for bit: the same gradients in, the same values out, sliced."""
    kind, options = OPTIMIZERS[name]
    model, optimizer, engine = trained(kind, **options)
    dense = copy.deepcopy(model)
    twin = kind(dense.parameters(), lr=1e-2, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel()))
        p.grad = q.grad.clone()
    units = {"0": [1, 4], "4": [0, 7]}
    parts = [s for g in engine.structure.groups for s in g.slices(units[g.name])]
    engine.prune_units(units)
    optimizer.step()
    twin.step()
    for (key, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        for part in (s for s in parts if s.tensor == key):
            q = q.detach().index_select(
                part.dim,
                torch.tensor([i for i in range(q.shape[part.dim]) if i not in part.indices]),
            )
        assert torch.equal(p, q), key


def test_what_cannot_be_moved_is_reset_and_told() -> None:
    model, optimizer, engine = trained(torch.optim.SGD)
    lbfgs = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)
    engine.attach_optimizer(lbfgs)
    receipt = engine.prune_units({"4": [1]})
    assert receipt.notes == ["LBFGS was reset: its history is one flat vector"]
    lbfgs.step(closure)
    optimizer.state[model[4].weight]["odd"] = torch.zeros(7)
    assert "state 'odd' of shape (7,)" in str(engine.prune_units({"4": [1]}))


def test_adafactor_and_muon_go_on() -> None:
    model, optimizer, engine = trained(torch.optim.Adafactor)
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    model(X).sum().backward()
    muon.step()
    engine.attach_optimizer(muon)
    assert not engine.prune_units({"0": [1, 2], "4": [3]}).notes
    model.zero_grad()
    model(X).sum().backward()
    optimizer.step()
    muon.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_live_graphs_accumulation_and_hooks() -> None:
    """A kept loss, gradients in the middle of accumulation, frozen and hooked parameters."""
    model, optimizer, engine = trained()
    calls: list[torch.Size] = []
    model[4].weight.register_hook(lambda g: calls.append(g.shape))
    model[6].bias.requires_grad_(False)
    kept = model(X).square().mean()
    kept.backward()
    gradient = model[4].weight.grad.clone()
    engine.prune_units({"4": [2]})
    assert torch.equal(model[4].weight.grad, gradient[[0, 1, *range(3, 10)]])
    history = [kept]
    for _ in range(3):
        history.append(model(X).square().mean())
        history[-1].backward()
        optimizer.step()
    assert calls[-1] == (9, 216)
    assert not model[6].bias.requires_grad
    assert all(torch.isfinite(h) for h in history)


def test_inference_mode_autocast_channels_last_and_bf16() -> None:
    model, optimizer, engine = trained()
    with torch.inference_mode():
        engine.prune_units({"4": [2]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X)
        engine.prune_units({"4": [2]})
        assert model(X).shape == (8, 3)
    model(X).sum().backward()
    optimizer.step()
    half = convnet().bfloat16().to(memory_format=torch.channels_last)
    engine = NeuronEngine()
    engine.track_model(half, "half", X.bfloat16())
    engine.prune_units({"0": [0, 3]})
    assert half[0].weight.dtype == torch.bfloat16
    half(X.bfloat16()).sum().backward()


def test_followers_and_ties() -> None:
    model, _, engine = trained()
    ema = torch.optim.swa_utils.AveragedModel(model)
    engine.attach_follower(ema)
    engine.prune_units({"0": [1], "4": [5, 6]})
    ema.update_parameters(model)
    assert ema(X).shape == (8, 3)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, t: Tensor) -> Tensor:
            return self.head(self.emb(t))

    tied, tokens = Tied(), torch.randint(20, (3, 4))
    engine = NeuronEngine()
    engine.track_model(tied, "tied", tokens)
    (group,) = [g for g in engine.structure.groups if g.prunable]
    engine.prune_units({group.name: [0, 5]})
    assert tied.head.weight is tied.emb.weight
    assert tied.emb.weight.shape == (20, 6)
    assert tied(tokens).shape == (3, 4, 20)


def test_ids_and_statistics_move_along() -> None:
    model, _, engine = trained()
    before = engine.get_dataset_statistics()
    pairs = {p[:2]: p[2] for p in engine.find_redundant_neurons(0.0)["0"]}
    ids = engine.track_model(model)
    gone = [ids["0"][1], ids["0"][4], ids["1"][1], ids["1"][4], ids["4"][3]]
    receipt = engine.prune_neurons([ids["0"][1], ids["0"][4], ids["4"][3]], compensate=False)
    assert receipt.removed_ids == gone
    assert engine.track_model(model)["0"] == [0, 2, 3, 5]
    assert engine.get_neuron_info(5) == ("0", 3)
    after = engine.get_dataset_statistics()
    assert set(after) == set(before) - set(gone)
    for neuron, row in after.items():
        assert row["mean"] == before[neuron]["mean"]
        assert row["variance"] == before[neuron]["variance"]
    for a, b, r in engine.find_redundant_neurons(0.0)["0"]:
        assert r == pairs[a, b]
    with pytest.raises(UnknownNeuronError, match="has left the network: removed by prune_units"):
        engine.get_neuron_info(gone[0])
    with pytest.raises(UnknownNeuronError, match="has left"):
        engine.prune_neurons([gone[0]], compensate=False)
    model(X)
    assert engine.get_neuron_stats(5)["batches"] == before[5]["batches"] + 1


def test_each_of_many_neurons_tells_in_few_words_why_it_left() -> None:
    """A checkpoint keeps it of each: with the names of all groups, 58,000 neurons of a language model took 66 MB."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(40)])
    engine = NeuronEngine()
    ids = engine.track_model(model, "deep", torch.randn(4, 6))
    engine.prune_neurons({str(n): [1] for n in range(39)}, compensate=False)
    with pytest.raises(UnknownNeuronError, match=r"\(group 0 and 38 others\)") as told:
        engine.get_neuron_info(ids["7"][1])
    assert len(str(told.value)) < 120


def test_dry_run_touches_nothing_and_undo_is_bit_for_bit() -> None:
    model, optimizer, engine = trained()
    model(X).sum().backward()
    before = snapshot(model, optimizer, engine)
    told = engine.prune_units({"0": [0, 2], "4": [1]}, dry_run=True)
    assert equal(snapshot(model, optimizer, engine), before)
    done = engine.prune_units({"0": [0, 2], "4": [1]})
    assert (told.dry_run, done.dry_run) == (True, False)
    assert (
        told.parameters_after == done.parameters_after == sum(p.numel() for p in model.parameters())
    )
    assert told.flops_after == done.flops_after < done.flops_before
    assert done.to_dict()["units"] == {"0": [0, 2], "4": [1]}
    assert not equal(snapshot(model, optimizer, engine), before)
    engine.undo()
    assert equal(snapshot(model, optimizer, engine), before)
    with pytest.raises(SurgeryError, match="no change to undo"):
        engine.undo()
    model.zero_grad()
    model(X).sum().backward()
    optimizer.step()


def test_a_wrong_result_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong columns for the consumer, shapes right: the swap is checked against the copy."""
    from tracker.surgery import apply as module
    from tracker.utils.slotmap import SlotMap

    model, optimizer, engine = trained()
    before = snapshot(model, optimizer, engine)
    real = module.moved

    def shifted(tensor: Tensor, slots: Any) -> Tensor:
        if tensor.shape == (3, 10):
            slots = {d: SlotMap(tuple(range(s.size))) for d, s in slots.items()}
        return real(tensor, slots)

    monkeypatch.setattr(module, "moved", shifted)
    with pytest.raises(VerificationError, match="differs from the masked model's"):
        engine.prune_units({"4": [1]})
    assert equal(snapshot(model, optimizer, engine), before)

    def on_the_model(tensor: Tensor, slots: Any) -> Tensor:
        return (shifted if tensor is model[6].weight else real)(tensor, slots)

    monkeypatch.setattr(module, "moved", on_the_model)
    with pytest.raises(VerificationError, match="Everything was undone"):
        engine.prune_units({"4": [1]})
    assert equal(snapshot(model, optimizer, engine), before)

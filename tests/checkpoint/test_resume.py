"""What a resumed run is made of: windows that go on, layers by hand, several models, ties, caches, architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import tracker
from tests.checkpoint.runs import CHANGES, begun, fresh
from tests.surgery.subjects import equal, train
from tracker import CheckpointError, Journal, NeuronEngine, apply_journal

SCHEMA = Path(tracker.__file__).parent / "schemas" / "journal.schema.json"
validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def statistics(engine: NeuronEngine) -> Any:
    return engine.get_dataset_statistics()


@pytest.mark.parametrize("name", ["mlp", "conv", "gated", "residual"])
@pytest.mark.parametrize("given", [True, False], ids=["inputs given", "inputs seen"])
def test_a_window_goes_on(name: str, given: bool, tmp_path: Path) -> None:
    model, opt, x = fresh(name, "Adam")
    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs=x if given else None)
    engine.attach_optimizer(opt)
    engine.start_tracking(enable_correlation_analysis=True)
    for _ in range(5):
        train(model, opt, x)
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh(name, "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    for _ in range(20):
        assert train(model, opt, x) == train(other, other_opt, x)
    assert statistics(engine) == statistics(resumed)
    mine, theirs = (e.generate_optimization_recommendations() for e in (engine, resumed))
    for each in (mine, theirs):
        del each["metadata"]["timestamp"]
    assert mine == theirs


AFTER: dict[str, Callable[[NeuronEngine, Tensor], Any]] = {
    "prune": lambda e, x: e.prune_neurons({"0": [2, 4]}),
    "merge": lambda e, x: e.merge_neurons(
        [tuple(e.track_model(e.tracker.current.model())["0"][:2])]
    ),
    "expand": lambda e, x: e.expand_layer("0", 2),
    "recycle": lambda e, x: e.recycle_neurons({"0": [1]}),
    "insert": lambda e, x: e.insert_layer(e.structure.groups[-1].layers[0]),
    "calibrate": lambda e, x: e.calibrate([x[:9]]),
    "compress": lambda e, x: e.compress(0.7, progress=False),
    "undo": lambda e, x: e.undo(),
}


def _unmeasured(receipt: Any) -> list[str]:
    """What a receipt says, but for the loss on batches that calibration held back: a checkpoint has no data."""
    data = ("squared change of the output", "note: measured on", "note: of each batch")
    return [line for line in str(receipt).splitlines() if not line.strip().startswith(data)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_all_changes_after_the_break(name: str, optimizer: str, tmp_path: Path) -> None:
    model, opt, engine, x = begun(name, optimizer)
    for change in ("prune", "insert", "expand"):
        CHANGES[change](engine)
        train(model, opt, x)
    engine.calibrate([x])
    engine.save_checkpoint(tmp_path / "run")
    other, other_opt, _ = fresh(name, optimizer)
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    for what, change in AFTER.items():
        told = [_unmeasured(change(each, x)) for each in (engine, resumed)]
        assert told[0] == told[1], what
        for _ in range(2):
            assert train(model, opt, x) == train(other, other_opt, x), what
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert statistics(engine) == statistics(resumed)
    assert [e.removed_ids for e in engine.journal] == [e.removed_ids for e in resumed.journal]


def test_the_structure_is_there_without_a_pass(tmp_path: Path) -> None:
    model, _, engine, _ = begun("mlp")
    engine.save_checkpoint(tmp_path / "run")
    other, opt, _ = fresh("mlp", "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, opt)
    for each in (engine, resumed):
        each.prune_neurons({"0": [3]})
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert str(engine.structure) == str(resumed.structure)


class Custom(nn.Module):
    """A layer whose width only a pass shows, and one whose axis is named by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scaled()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("seen", [True, False])
def test_layers_by_hand_and_layers_not_yet_seen(seen: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Custom(), torch.randn(5, 4, 6)
    engine = NeuronEngine()
    engine.track_model(model, "custom", axes={"body.1": 2}, batch_dim=1)
    engine.start_tracking()
    if seen:
        model(x)
        engine.insert_layer("body.0")
        model(x)
    ids = engine.track_model(model)
    engine.save_checkpoint(tmp_path / "run")
    other = Custom()
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other)
    assert resumed.track_model(other) == ids
    for each in (model, other):
        each(x)
    assert resumed.track_model(other) == engine.track_model(model)
    assert "first" in resumed.track_model(other)
    assert "body.1" in resumed.track_model(other)
    assert statistics(resumed) == statistics(engine)
    assert resumed.get_summary() == engine.get_summary()


def test_one_of_several_models(tmp_path: Path) -> None:
    first, _, engine, _ = begun("mlp")
    second, opt, x = fresh("mlp", "Adam")
    engine.track_model(second, "second", example_inputs=x)
    engine.attach_optimizer(opt)
    engine.prune_neurons({"0": [1]})
    engine.save_checkpoint(tmp_path / "run")
    other, _, _ = fresh("mlp", "Adam")
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other)
    mine = engine.track_model(second)
    assert resumed.track_model(other) == mine
    assert resumed.get_neuron_info(mine["0"][4]) == ("0", 4)
    for ids in engine.track_model(first).values():
        for neuron in ids:
            with pytest.raises(KeyError):
                resumed.get_neuron_info(neuron)
    assert len(resumed.journal) == 1


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.cache + 1
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2), persistent=False)
        return self.head(self.table(x))


def test_ties_caches_and_frozen_parameters(tmp_path: Path) -> None:
    model, x = Tied(), torch.arange(9)
    engine = NeuronEngine()
    engine.track_model(model, "tied")
    model(x)
    model.head.weight.requires_grad_(False)
    engine.save_checkpoint(tmp_path / "run")
    other = Tied()
    NeuronEngine.load_checkpoint(tmp_path / "run", other)
    assert other.head.weight is other.table.weight
    assert torch.equal(other.cache, model.cache)
    assert not other.head.weight.requires_grad
    assert torch.equal(model(x), other(x))
    loose = Tied(tied=False)
    before = {k: v.clone() for k, v in loose.state_dict().items()}
    with pytest.raises(CheckpointError, match="tied"):
        apply_journal(loose, tmp_path / "run")
    assert equal(dict(loose.state_dict()), before)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    mine, opt, engine, _ = begun("mlp")
    engine.save_checkpoint(tmp_path / "run")
    model, _, _ = fresh("mlp", "Adam")
    with pytest.raises(CheckpointError, match=r"fresh_model\.parameters"):
        NeuronEngine.load_checkpoint(tmp_path / "run", model, opt)
    loose = nn.Parameter(torch.zeros(1))
    engine.attach_optimizer(torch.optim.SGD([loose, *mine.parameters()]))
    with pytest.raises(CheckpointError, match="beside some that are"):
        engine.save_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_the_journal_alone_gives_the_architecture(name: str) -> None:
    model, opt, engine, x = begun(name)
    changes: list[Callable[[], Any]] = [
        *(lambda c=c: c(engine) for c in (CHANGES.values() if name != "residual" else ())),
        *([lambda: engine.insert_layer("0.inserted.linear")] if name == "mlp" else []),
        *([lambda: engine.remove_layer("2", batches=[x], force=True)] if name == "mlp" else []),
        *(
            [
                lambda: engine.expand_layer("blocks.0.1", 3),
                lambda: engine.insert_layer("blocks.1.1"),
                lambda: engine.remove_layer("blocks.1", batches=[x], force=True),
                lambda: engine.compress(0.8, progress=False, batches=[x]),
            ]
            if name == "residual"
            else []
        ),
    ]
    for change in changes:
        change()
        train(model, opt, x)
    validator.validate(engine.journal.to_dict())
    journal = Journal.from_dict(engine.journal.to_dict())
    assert journal.to_dict() == engine.journal.to_dict()
    other, _, _ = fresh(name, "Adam")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    text, hooks = str(other), [len(m._forward_hooks) for m in other.modules()]
    parameters = [id(p) for p in other.parameters()]
    log = journal.replay(other)
    assert str(other) == str(model)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in other.state_dict().items()} == shapes
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))
    log.undo()
    other.train()
    assert str(other) == text
    assert [len(m._forward_hooks) for m in other.modules()] == hooks
    assert [id(p) for p in other.parameters()] == parameters
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Split(nn.Module):
    """Attention that remembers its heads as an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 4
        self.qkv = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, self.heads, self.width).transpose(1, 2) for m in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(b, t, self.heads * self.width))


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 3)])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_tensors_lie_in_memory_as_they_did(
    shape: tuple[int, ...], form: torch.memory_format, tmp_path: Path
) -> None:
    build: Callable[[], nn.Module] = lambda: nn.Conv2d(shape[1], 4, 3)  # noqa: E731
    model = build().to(memory_format=form)
    engine = NeuronEngine()
    engine.track_model(model, "conv")
    engine.save_checkpoint(tmp_path / "run")
    other = apply_journal(build(), tmp_path / "run")
    assert other.weight.stride() == model.weight.stride()
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("build", [Attends, Split])
def test_heads_that_went_stay_gone(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(6, 5, 16)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    engine = NeuronEngine()
    engine.track_model(model, "attention", example_inputs=x)
    engine.attach_optimizer(opt)
    train(model, opt, x)
    for _ in range(2):
        heads = next(g for g in engine.structure.groups if g.kind == "head" and g.prunable)
        engine.prune_units({heads.name: [1]})
        train(model, opt, x)
    engine.save_checkpoint(tmp_path / "run")
    other = build()
    other_opt = torch.optim.AdamW(other.parameters(), fused=True)
    resumed = NeuronEngine.load_checkpoint(tmp_path / "run", other, other_opt)
    assert train(model, opt, x) == train(other, other_opt, x)
    for each in (engine, resumed):
        heads = next(g for g in each.structure.groups if g.kind == "head" and g.prunable)
        each.prune_units({heads.name: [0]})
    assert train(model, opt, x) == train(other, other_opt, x)
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]

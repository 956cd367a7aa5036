"""Batches as people have them: the part that the model takes is told by the model, or asked for, and never guessed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tracker import Call, NeuronEngine, StructureError, SurgeryError


class Net(nn.Module):
    """One argument, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        y = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return 2 * y if double else y


class Masked(Net):
    """An optional second argument, which only some tensors can be."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if mask is None else x.masked_fill(mask, 0.0))


class WithLoss(Net):
    """Targets may be passed, as GPTs in one file take them."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        y = super().forward(x)
        return y if targets is None else (y, nn.functional.cross_entropy(y, targets))


class Two(Net):
    """Two arguments."""

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * gain)


class OfList(Net):
    """One argument that is a list."""

    def forward(self, parts: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(parts))


class OfDict(Net):
    """One argument that is a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"])


X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
GAIN = torch.rand(96, 1, generator=torch.Generator().manual_seed(2)) + 0.5
Y = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(3))
PARTS = list(zip(X.split(24), GAIN.split(24), Y.split(24), strict=True))


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), 24)


# model, example inputs, batches as people have them, the calls that they stand for
FORMS: dict[str, tuple[type[Net], Any, Callable[[], Any], list[Call]]] = {
    "loader of pairs": (Net, X[:4], lambda: loader(X, Y), [Call(x) for x, _, _ in PARTS]),
    "tuples": (Net, X[:4], lambda: [(x, y) for x, _, y in PARTS], [Call(x) for x, _, _ in PARTS]),
    "inputs alone": (Net, X[:4], lambda: [x for x, _, _ in PARTS], [Call(x) for x, _, _ in PARTS]),
    "one tensor": (Net, X[:4], lambda: X, [Call(X)]),
    "one-tuples": (Net, X[:4], lambda: loader(X), [Call(x) for x, _, _ in PARTS]),
    "dicts with targets": (
        Net, X[:4], lambda: [{"x": x, "label": y} for x, _, y in PARTS], [Call(x) for x, _, _ in PARTS],
    ),
    "pair of a dict and targets": (
        Net, X[:4], lambda: [({"x": x}, y) for x, _, y in PARTS], [Call(x) for x, _, _ in PARTS],
    ),
    "calls": (Net, X[:4], lambda: [Call(x) for x, _, _ in PARTS], [Call(x) for x, _, _ in PARTS]),
    "two inputs": (
        Two, (X[:4], GAIN[:4]), lambda: loader(X, GAIN), [Call(x, g) for x, g, _ in PARTS],
    ),
    "two inputs and targets": (
        Two, (X[:4], GAIN[:4]), lambda: loader(X, GAIN, Y), [Call(x, g) for x, g, _ in PARTS],
    ),
    "two inputs in a tuple": (
        Two, (X[:4], GAIN[:4]), lambda: [((x, g), y) for x, g, y in PARTS], [Call(x, g) for x, g, _ in PARTS],
    ),
    "two by name": (
        Two, {"x": X[:4], "gain": GAIN[:4]}, lambda: loader(X, GAIN, Y), [Call(x, g) for x, g, _ in PARTS],
    ),
    "no mask": (Masked, X[:4], lambda: loader(X, Y.float()), [Call(x) for x, _, _ in PARTS]),
    "with a mask": (
        Masked, (X[:4], X[:4] > 1), lambda: loader(X, X > 1, Y), [Call(x, x > 1) for x, _, _ in PARTS],
    ),
    "lists": (
        OfList, ([X[:4], X[4:8]],), lambda: [([x, x], y) for x, _, y in PARTS], [Call([x, x]) for x, _, _ in PARTS],
    ),
    "the list itself": (
        OfList, ([X[:4], X[4:8]],), lambda: [[x, x] for x, _, _ in PARTS], [Call([x, x]) for x, _, _ in PARTS],
    ),
    "a dict as argument": (
        OfDict, ({"x": X[:4]},), lambda: [{"x": x, "y": y} for x, _, y in PARTS], [Call({"x": x}) for x, _, _ in PARTS],
    ),
}  # fmt: skip


def engine_of(kind: type[Net], example: Any) -> tuple[Net, NeuronEngine]:
    model, engine = kind(), NeuronEngine()
    engine.track_model(model, "m", example_inputs=example)
    return model, engine


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_data_gives_the_same_change(form: str) -> None:
    kind, example, batches, calls = FORMS[form]
    ours, engine = engine_of(kind, example)
    theirs, other = engine_of(kind, example)
    engine.calibrate(batches())
    other.calibrate(calls)
    before = state(ours)
    engine.prune_units({"fc1": [0, 1, 2, 3]}, compensate=True)
    other.prune_units({"fc1": [0, 1, 2, 3]}, compensate=True)
    assert same(state(ours), state(theirs))
    assert not torch.equal(before["fc2.weight"][:, 4:], state(ours)["fc2.weight"])
    a = engine.compress(0.7, batches=batches())
    b = other.compress(0.7, batches=calls)
    assert same(state(ours), state(theirs))
    assert (a.loss_before, a.loss_after) == (b.loss_before, b.loss_after)
    told = any("of each batch the model takes" in note for note in a.notes)
    assert told == (form != "calls")


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[-1] if isinstance(batch, list) else batch["y"])


@pytest.mark.parametrize("form", ["loader", "dicts", "GPT in one file", "two inputs"])
def test_a_loss_is_given_the_whole_batch(form: str) -> None:
    kind, example, batches = {
        "loader": (Net, X[:4], loader(X, Y)),
        "dicts": (Net, X[:4], [{"x": x, "y": y} for x, _, y in PARTS]),
        "GPT in one file": (WithLoss, X[:4], loader(X, Y)),
        "two inputs": (Two, (X[:4], GAIN[:4]), loader(X, GAIN, Y)),
    }[form]
    model, engine = engine_of(kind, example)
    x, gain, y = PARTS[-1]  # each fourth batch is held back
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(x, gain) if kind is Two else model(x), y)
    receipt = engine.compress(0.7, batches=batches, loss=cross_entropy)
    assert receipt.loss_before == pytest.approx(float(before), rel=1e-6)
    engine.expand_layer("fc1", 2, batches=batches, loss=cross_entropy)


@pytest.mark.parametrize(
    ("kind", "example", "batch", "says"),
    [
        (WithLoss, X[:4], (X, Y), "the first entry or the first 2 could be"),
        (Net, X[:4], (Y, X), "batch[1]"),
        (Net, X[:4], {"image": X, "label": Y}, "batch['image']"),
        (Two, (X[:4], GAIN[:4]), {"x": X, "label": Y}, "nothing names gain"),
        (Net, X[:4], 3, "DataLoader"),
    ],
)
def test_what_nothing_tells_is_asked_for(
    kind: type[Net], example: Any, batch: Any, says: str
) -> None:
    _, engine = engine_of(kind, example)
    given = batch if isinstance(batch, int) else [batch]
    for call in (engine.calibrate, lambda b: engine.compress(0.5, batches=b)):
        with pytest.raises(SurgeryError) as refusal:
            call(given)
        assert says in str(refusal.value)
        assert isinstance(batch, int) or "inputs=lambda batch" in str(refusal.value)


def test_the_user_says_which_part_it_is() -> None:
    _, engine = engine_of(WithLoss, X[:4])
    theirs, other = engine_of(WithLoss, X[:4])
    assert engine.calibrate(loader(X, Y), inputs=lambda batch: batch[0]) == 2
    with pytest.raises(StructureError, match=r"a batch failed .*inputs="):
        engine.calibrate(loader(X, Y), inputs=lambda batch: batch[1])
    with pytest.raises(SurgeryError, match="could be"):
        engine.calibrate(loader(X, Y))
    ours = engine.tracker.current.model()
    other.calibrate([x for x, _, _ in PARTS])
    for each in (engine, other):
        each.prune_units({"fc1": [1, 2]}, compensate=True)
    assert same(state(ours), state(theirs))  # what failed changed nothing


def test_one_line_says_what_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    _, engine = engine_of(Net, X[:4])
    with caplog.at_level(logging.INFO, "tracker"):
        engine.calibrate(loader(X, Y))
    assert caplog.messages == [
        "Net: of each batch the model takes (Tensor(24, 6)), not [1] Tensor(24,)"
    ]


def test_batches_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc, self.head = (
                nn.Embedding(50, 8),
                nn.Linear(8, 16),
                nn.Linear(16, 2),
            )

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
        ) -> dict[str, Tensor]:
            mean = (self.embed(input_ids) * attention_mask[..., None]).mean(1)
            logits = self.head(self.fc(mean).relu())
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    ids, mask = torch.randint(0, 50, (32, 5)), torch.ones(32, 5)
    encoded = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(32).long(), "special": ids}
    )
    engine = NeuronEngine()
    model = Bag()
    engine.track_model(model, "m", example_inputs=(ids[:2], mask[:2]))
    receipt = engine.compress(
        0.8, batches=[encoded] * 4, loss=lambda output, batch: output["loss"], dry_run=True
    )
    assert receipt.loss == "the given loss"
    assert any("not special" in note for note in receipt.notes)


class Counted:
    """A generator that can be gone through once."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        assert self.passes == 1
        yield from loader(X, Y)


def test_data_are_gone_through_once() -> None:
    _, engine = engine_of(Net, X[:4])
    for call in (
        lambda b: engine.calibrate(b),
        lambda b: engine.compress(0.8, batches=b, dry_run=True),
        lambda b: engine.compress(0.8, batches=b, rounds=2, dry_run=True),
        lambda b: engine.expand_layer("fc1", 1, batches=b, loss=cross_entropy, dry_run=True),
        lambda b: engine.remove_layer("fc2", batches=b, force=True, dry_run=True),
        lambda b: engine.merge_neurons([(0, 1)], batches=b, dry_run=True),
    ):
        batches = Counted()
        call(batches)
        assert batches.passes == 1
    generator = iter(loader(X, Y))
    engine.calibrate(generator, limit=3)
    assert len(list(generator)) == 1
    with pytest.raises(SurgeryError, match="no batch"):
        engine.calibrate(generator)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_only_tried_leaves_the_calibration(rounds: int, fails: bool) -> None:
    ours, engine = engine_of(Net, X[:4])
    theirs, other = engine_of(Net, X[:4])
    for each in (engine, other):
        each.calibrate(loader(X, Y), loss=cross_entropy)
    if fails:
        with pytest.raises(SurgeryError):
            engine.compress(0.5, floor=11, batches=loader(3 * X + 1, Y), rounds=rounds)
    else:
        engine.compress(0.5, batches=loader(3 * X + 1, Y), rounds=rounds, dry_run=True)
        engine.compress(0.5, rounds=rounds, dry_run=True)
    receipts = [each.compress(0.6) for each in (engine, other)]
    assert same(state(ours), state(theirs))
    assert receipts[0].candidates == receipts[1].candidates


def test_gradients_for_growth_leave_no_trace() -> None:
    """Neither in running statistics nor in the random state, in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    )
    engine, pairs = NeuronEngine(), list(loader(X, Y))  # a loader itself draws a seed
    engine.track_model(model, "m", example_inputs=X[:4])
    before, random = state(model), torch.random.get_rng_state()
    engine.expand_layer("0", 2, batches=pairs, loss=cross_entropy, dry_run=True)
    assert same(before, state(model))
    assert torch.equal(random, torch.random.get_rng_state())
    kept = copy.deepcopy(model)
    engine.expand_layer("0", 2, batches=pairs, loss=cross_entropy)
    assert torch.equal(model[1].running_mean[:12], kept[1].running_mean)


def test_norms_and_layers_take_loaders_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3))
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=X[:4])
    assert engine.reestimate_norms(loader(X, Y)) == ["1"]
    with torch.no_grad():
        assert torch.allclose(model[1].running_mean, model[0](X).mean(0), atol=1e-5)
    receipt = engine.remove_layer("2", batches=loader(X, Y))
    assert any("of each batch" in note for note in receipt.notes)


def test_a_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, engine = engine_of(Net, X[:4])
    engine.compress(0.8, batches=loader(X, Y), dry_run=True)
    assert capsys.readouterr().err == ""
    engine.compress(0.8, batches=loader(X, Y), progress=True, dry_run=True)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("Calibrating", "Weighing units", "Trying budgets"))

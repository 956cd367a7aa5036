"""Whatever someone writes into a checkpoint: it is refused, and nothing is changed, or it is a run that trains.

60 changes of all that a seed gives by default; with TRACKER_MUTANTS=n (`make asan`) n of them, which then train longer.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.mutants import Mutant, listing, mutants
from tests.checkpoint.test_hostile_files import groups_of, hooks_of, states_of_noise
from tests.surgery.subjects import conv, equal, mlp, snapshot
from tracker import CheckpointError, NeuronEngine, Policy, TrackerError

SEED = 20
SOME = 60
MANY = int(os.environ.get("TRACKER_MUTANTS") or SOME)
STEPS = 20 if MANY > SOME else 2
SECONDS = 2.0  # for a refusal
Built = tuple[nn.Module, list[torch.optim.Optimizer], Tensor]


class Tied(nn.Module):
    """Attention heads, tied weights, a cache that is in no state dict, frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight
        self.block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.register_buffer("cache", torch.ones(16), persistent=False)
        self.block.norm1.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x) * self.cache))


def of_mlp() -> Built:
    model = mlp()
    return model, [torch.optim.Adam(model.parameters(), 1e-3)], torch.randn(40, 6)


def of_conv() -> Built:
    model = conv().to(memory_format=torch.channels_last)
    heads = [p for n, p in model.named_parameters() if n.startswith("9")]
    body = [p for n, p in model.named_parameters() if not n.startswith("9")]
    optimizers = [
        torch.optim.AdamW(body, 1e-3, fused=True),
        torch.optim.SGD(heads, 1e-2, momentum=0.9),
    ]
    return model, optimizers, torch.randn(12, 1, 12, 12)


def of_tied() -> Built:
    model = Tied()
    return model, [torch.optim.AdamW(model.parameters(), 1e-3)], torch.randint(0, 11, (8, 5))


SUBJECTS: dict[str, Callable[[], Built]] = {"mlp": of_mlp, "conv": of_conv, "tied": of_tied}
WIDENED = {"mlp": "0", "conv": "0", "tied": "block.linear1"}
POLICY = Policy(
    warm_up=0, every=12, look=8, settle=4, floor=2, grow=True, drop=0.2, plateau=1.0, patience=1
)


def fresh(name: str) -> Built:
    torch.manual_seed(0)
    return SUBJECTS[name]()


def trained(model: nn.Module, optimizers: list[torch.optim.Optimizer], x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def saved(name: str, folder: Path) -> Path:
    """A run in mid-training that has all that a checkpoint can hold."""
    model, optimizers, x = fresh(name)
    engine = NeuronEngine()
    engine.track_model(model, name, example_inputs=x)
    engine.attach_optimizer(*optimizers)
    engine.start_tracking(enable_correlation_analysis=True)
    trained(model, optimizers, x)
    engine.log_epoch_statistics(0, 1.0, 0.5)
    groups = {g.kind: g for g in reversed(engine.structure.groups) if g.prunable}
    if "head" in groups:
        engine.prune_units({groups["head"].name: [1]})
    layer = WIDENED[name]
    engine.prune_neurons({layer: [0, 3]})
    engine.expand_layer(layer, 1)
    if name == "mlp":
        engine.insert_layer("0")
    trained(model, optimizers, x)
    engine.log_epoch_statistics(1, 0.5, None)
    engine.calibrate([x], loss=lambda output, batch: output.square().mean())
    engine.start_self_modification(POLICY)
    for _ in range(6):
        engine.step(trained(model, optimizers, x))
    assert engine.trainer.run is not None
    assert engine.trainer.run._watch is not None
    return engine.save_checkpoint(folder / name)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path, Mutant]]:
    """Subjects, where they lie, and changes of them, in an order that the seed gives."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: saved(name, folder) for name in SUBJECTS}
    every = [(name, run, m) for name, run in runs.items() for m in mutants(run, SEED)]
    random.Random(SEED).shuffle(every)
    return every


@pytest.mark.parametrize(
    "number", [n if n < SOME else pytest.param(n, marks=pytest.mark.slow) for n in range(MANY)]
)
def test_a_changed_checkpoint_is_refused_or_trains(
    number: int, chosen: list[tuple[str, Path, Mutant]], tmp_path: Path
) -> None:
    name, run, mutant = chosen[number]
    print(name, mutant.name)  # shown where it fails
    print("it was", outcome(name, run, mutant, tmp_path / "run", STEPS))


def test_a_checkpoint_that_nobody_changed_is_loaded(
    chosen: list[tuple[str, Path, Mutant]], tmp_path: Path
) -> None:
    for name, run in {name: run for name, run, _ in chosen}.items():
        (tmp_path / name).mkdir()
        same = Mutant("none", lambda folder: None)
        assert outcome(name, run, same, tmp_path / name / "run", STEPS) == "loaded"


def outcome(name: str, run: Path, mutant: Mutant, folder: Path, steps: int) -> str:
    """Hold one mutant against the law; "refused" or "loaded"."""
    shutil.copytree(run, folder)
    mutant.apply(folder)
    model, optimizers, x = fresh(name)
    trained(model, optimizers, x)
    every = [(snapshot(model, o), groups_of(o), hooks_of(model, o)) for o in optimizers]
    before = copy.deepcopy([e[:1] for e in every]), copy.deepcopy([e[1] for e in every])
    hooks, flags, noise = [e[2] for e in every], _flags(model), states_of_noise()
    files = listing(folder)
    start = time.perf_counter()
    engine, refusal = None, ""
    try:
        engine = NeuronEngine.load_checkpoint(folder, model, optimizers)
    except CheckpointError as error:
        refusal = str(error)
    took = time.perf_counter() - start
    assert listing(folder) == files
    if engine is None:
        assert refusal
        assert took < SECONDS, f"refused after {took:.1f} s"
        after = [(snapshot(model, o), groups_of(o), hooks_of(model, o)) for o in optimizers]
        assert equal([[a[0]] for a in after], [list(b) for b in before[0]])
        assert [a[1] for a in after] == before[1]
        assert [a[2] for a in after] == hooks
        assert _flags(model) == flags
        assert equal(states_of_noise(), noise)
        return "refused"
    _goes_on(engine, (model, optimizers, x), WIDENED[name], steps, folder.parent)
    return "loaded"


def _flags(model: nn.Module) -> list[Any]:
    return [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


def _goes_on(engine: NeuronEngine, run: Built, layer: str, steps: int, folder: Path) -> None:
    """It trains, is watched, is changed or refuses that, and can be saved."""
    model, optimizers, x = run
    for _ in range(steps):
        engine.step(trained(model, optimizers, x))
    for ask in (
        lambda: engine.get_dataset_statistics(),
        lambda: engine.find_redundant_neurons(0.5),
        lambda: engine.generate_optimization_recommendations(),
        lambda: engine.log_epoch_statistics(7, 1.0, 0.5),
        lambda: engine.prune_neurons({layer: [1]}, compensate=True),
        lambda: engine.undo(),
    ):
        with suppress(TrackerError):
            ask()
    trained(model, optimizers, x)
    engine.save_checkpoint(folder / "again")

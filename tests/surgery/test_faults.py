"""A fault at every operation and at every line that a change runs: nothing is torn, whatever came before.

Of lines each hundredth or so by default, all of them with TRACKER_LONG=1 (`make long`).
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import tracker
from tests.surgery.bits import FaultAt, FaultError, equal, everything
from tests.surgery.test_removal import X, convnet
from tests.zoo_computed import COMPUTED
from tracker import NeuronEngine, TrackerError
from tracker.inputs.forward_pass import copy_of

ROOT = Path(tracker.__file__).parent
# What a change runs through on the model itself, its optimizer and its statistics.
ROOMS = (
    "surgery", "structure/code_sizes", "structure/adapters", "journal", "parts", "tracker.py",
    "observation/neuron_ids.py", "observation/consumer_inputs.py", "utils/slotmap.py", "statistics", "modules",
)  # fmt: skip
STRIDE = int(os.environ.get("TRACKER_LONG") or 101)


class Lines:
    """Raises at the k-th line that is run in one of the rooms; 0 only counts."""

    def __init__(self, k: int) -> None:
        self.k, self.seen = k, 0
        self.at = ""
        self._ours: dict[str, bool] = {}

    def enter(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        if file not in self._ours:
            self._ours[file] = file.startswith(tuple(str(ROOT / room) for room in ROOMS))
        return self.line if self._ours[file] else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "line":
            self.seen += 1
            if self.seen == self.k:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise FaultError
        return self.line


@contextmanager
def traced(lines: Lines) -> Iterator[Lines]:
    before = sys.gettrace()
    sys.settrace(lines.enter)
    try:
        yield lines
    finally:
        sys.settrace(before)


def computed() -> nn.Sequential:
    """Each layer but the last computes its weight, each in a way of its own."""
    torch.manual_seed(0)
    layers = [part for how in COMPUTED.values() for part in (how(nn.Linear(6, 6)), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(6, 3))


Begun = tuple[nn.Module, torch.optim.Optimizer, NeuronEngine, nn.Module]


def trained(name: str) -> Begun:
    build, x = (computed, ROWS) if name in OF_COMPUTED else (convnet, X)
    model = build()
    model(x)  # the older spectral norm of torch keeps what it computed
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    follower = torch.optim.swa_utils.AveragedModel(copy_of(model))
    engine = NeuronEngine()
    engine.track_model(model, "m", x)
    engine.attach_optimizer(optimizer)
    engine.attach_follower(follower)
    engine.start_tracking(enable_correlation_analysis=True)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer, engine, follower


def of_each(engine: NeuronEngine) -> dict[str, list[int]]:
    """A unit of each group."""
    return {group.name: [1] for group in engine.structure.groups if group.prunable}


ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
OF_COMPUTED: dict[str, Callable[[NeuronEngine], Any]] = {
    "take over computed weights": lambda engine: engine.prune_units(
        of_each(engine), compensate=True
    ),
    "expand computed weights": lambda engine: engine.expand_layer("12", 2),
}
CHANGES: dict[str, Callable[[NeuronEngine], Any]] = {
    "prune": lambda engine: engine.prune_units({"0": [0, 2], "4": [1]}),
    "prune without a trial": lambda engine: engine.prune_units(
        {"0": [0, 2], "4": [1]}, verify=False
    ),
    "expand": lambda engine: engine.expand_layer("4", 2),
    "insert": lambda engine: engine.insert_layer("4"),
    "take over": lambda engine: engine.prune_units({"4": [1, 5]}, compensate=True),
    "merge": lambda engine: engine.merge_neurons([(7, 8), (9, 10)]),
    "recycle": lambda engine: engine.recycle_neurons({"4": [3]}),
    "remove": lambda engine: engine.remove_layer("4", force=True),
    **OF_COMPUTED,
}


def stride_of(name: str) -> int:
    """A change of computed weights takes longer, and has more lines."""
    return STRIDE * 20 if name in OF_COMPUTED and STRIDE > 1 else STRIDE


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_fault_at_any_line_leaves_everything_as_it_was(name: str) -> None:
    """Model, gradients, optimizer, follower, statistics, ids and journal, bit for bit."""
    model, optimizer, engine, follower = trained(name)
    _ = engine.structure

    def state() -> list[Any]:
        seen = [engine.get_dataset_statistics(), engine.find_redundant_neurons(0.0)]
        return [
            everything(model, optimizer, engine),
            follower.state_dict(),
            seen,
            len(engine.journal),
        ]

    CHANGES[name](engine)  # what is cached at the first time has lines of its own
    engine.undo()

    def counted() -> int:
        """Lines of the change, undisturbed."""
        gc.collect()  # what other tests left is not ended, line by line, while lines are counted
        with traced(Lines(0)) as lines:
            CHANGES[name](engine)
        engine.undo()
        return lines.seen

    before = counted()
    held, points = state(), 0
    stride = stride_of(name)
    for k in itertools.count(1, stride):
        _ = engine.structure
        lines = Lines(k)
        try:
            with traced(lines):
                CHANGES[name](engine)
            engine.undo()  # it came where a failure does no harm, or not at all
        except (FaultError, TrackerError):
            pass
        assert equal(state(), held), f"torn at line {k}, {lines.at}"
        if lines.seen < k:  # how many lines there are is known only where the last has run
            break
        points += 1
    least = min(before, counted())  # what is looked up once may be known by now
    print(f"{name}: {points} injection points of {least} lines, nothing torn")
    assert points > 6
    assert points * stride > 0.95 * least


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune", "take over computed weights"])
def test_a_fault_at_any_operation_leaves_everything_as_it_was(name: str) -> None:
    """Injected at ATen operations of a change, the copies that it is tried on and the swap itself included."""
    model, optimizer, engine, _ = trained(name)
    _ = engine.structure
    before, points = everything(model, optimizer, engine), 0
    stride = 5 * STRIDE if name in OF_COMPUTED and STRIDE > 1 else 1
    for k in itertools.count(1, stride):
        _ = engine.structure
        fault = FaultAt(k)
        try:
            with fault:
                CHANGES[name](engine)
            if fault.left > 0:
                break
            engine.undo()  # it hit a look at other inputs, which need not be possible
        except (FaultError, TrackerError):
            assert fault.left <= 0
        points += 1
        assert equal(everything(model, optimizer, engine), before), f"torn at operation {k}"
    print(f"{name}: {points} injection points, nothing torn")
    assert points > (4 if stride > 1 else 300)
    engine.undo()
    assert equal(everything(model, optimizer, engine), before)

"""Runs in mid-training, to be saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.surgery.subjects import MODELS, OPTIMIZERS, train
from tracker import NeuronEngine

ROOT = Path(__file__).parents[2]
CHANGES: dict[str, Callable[[NeuronEngine], Any]] = {
    "prune": lambda e: e.prune_neurons({"0": [0, 3]}),
    "zero": lambda e: e.prune_neurons({"0": [1]}, compensate=False),
    "merge": lambda e: e.merge_neurons([(4, 5)]),
    "expand": lambda e: e.expand_layer("0", 2),
    "recycle": lambda e: e.recycle_neurons({"0": [2]}),
    "insert": lambda e: e.insert_layer("0"),
}


def fresh(name: str, optimizer: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build()
    return model, OPTIMIZERS[optimizer](model.parameters()), torch.randn(shape)


def begun(name: str, optimizer: str = "Adam") -> tuple[Any, ...]:
    model, opt, x = fresh(name, optimizer)
    engine = NeuronEngine(0.02, 0.8)
    engine.track_model(model, name, example_inputs=x)
    engine.attach_optimizer(opt)
    engine.start_tracking(enable_correlation_analysis=True)
    for step in range(3):
        engine.log_epoch_statistics(step, train(model, opt, x), 0.5)
    return model, opt, engine, x

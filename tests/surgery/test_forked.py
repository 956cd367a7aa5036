"""Laws over random networks that take several paths: what one call runs is not all that there is.

A head of train mode only, an optional argument, another public method, a branch that data decide, experts that no
row chose, and weights that the forward computes. After any chain of changes every path runs, or the group was refused
by name; and where "masked" is promised, each path gives what it gave when its consumers read zeros.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.surgery.forked import (
    PATHS,
    Forked,
    Pick,
    batch,
    difference,
    everything,
    space_of,
    zeroed,
)
from tracker import Call, NeuronEngine
from tracker.errors import TrackerError

COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck))


def every_call() -> list[Call]:
    """Examples that run all paths, experts included."""
    return [Call(batch(sign), method=method, **kwargs) for method, kwargs, sign in PATHS.values()]


def some(size: int, pick: Pick) -> list[int]:
    rest = list(range(size))
    return sorted(rest.pop(pick(range(len(rest)))) for _ in range(pick(range(1, size // 2 + 1))))


def removed(model: Forked, engine: NeuronEngine, pick: Pick) -> str:
    """Remove some units of one group; what became of it."""
    groups = [g for g in engine.structure.groups if g.size > 1]
    if not groups:
        return "nothing"
    group = pick(groups)
    units, space = some(group.size, pick), space_of(model, group)
    before = copy.deepcopy(model.state_dict())
    original = copy.deepcopy(model)
    try:
        receipt = engine.prune_units({group.name: units})
    except TrackerError:
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        return "refused"
    for training in (False, True):
        found = everything(model, training)
        if receipt.promise == "masked" and space is not None:
            with zeroed(original, space, units):
                assert difference(found, everything(original, training)) < 1e-9
        else:
            assert all(t.isfinite().all() for path in found.values() for t in path)
    return receipt.promise


def chain(pick: Pick, examples: Any) -> list[str]:
    model = Forked(pick)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "forked", example_inputs=examples)
    engine.attach_optimizer(optimizer)
    done = []
    for _ in range(pick(range(1, 5))):
        action = pick(["remove", "remove", "train", "widen", "undo"])
        if action == "train":
            model.train()
            for method, kwargs, sign in PATHS.values():
                out = getattr(model, method)(batch(sign), **kwargs)
                parts = out if isinstance(out, tuple) else (out,)
                for part in parts:
                    if part.requires_grad:
                        part.square().mean().backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
        elif action == "widen":
            try:
                engine.expand_layer(f"blocks.{pick(range(len(model.blocks)))}.up", 2)
            except TrackerError:
                continue
        elif action == "undo" and done and done[-1] in ("masked", "changed"):
            engine.undo()
        elif action == "remove":
            done.append(removed(model, engine, pick))
            continue
        everything(model, True), everything(model, False)
        done.append(action)
    return done


@pytest.mark.slow
@given(data=st.data())
@settings(COMMON, max_examples=25)
def test_every_path_given_is_kept(data: st.DataObject) -> None:
    chain(lambda options: data.draw(st.sampled_from(options)), every_call())


@pytest.mark.slow
@given(data=st.data())
@settings(COMMON, max_examples=25)
def test_a_path_not_given_is_refused_or_kept(data: st.DataObject) -> None:
    chain(lambda options: data.draw(st.sampled_from(options)), batch(1, rows=2))


def test_not_all_is_refused() -> None:
    """With every path given most groups can go, and without them some still can."""
    import random

    for examples, least in ((every_call(), 0.5), (batch(1, rows=2), 0.05)):
        outcomes = [
            removed(model, engine, random.Random(seed).choice)
            for seed in range(20)
            for model, engine in [tracked(seed, examples)]
        ]
        assert sum(o in ("masked", "changed") for o in outcomes) >= least * len(outcomes)


def tracked(seed: int, examples: Any) -> tuple[Forked, NeuronEngine]:
    import random

    model, engine = Forked(random.Random(seed).choice), NeuronEngine()
    engine.track_model(model, "forked", example_inputs=examples)
    return model, engine

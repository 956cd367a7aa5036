"""Replicas in several processes: statistics as of one process, changes on all ranks or on none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.world import run
from tracker import (
    NeuronEngine,
    Policy,
    StructureError,
    SurgeryError,
    TrackerError,
    VerificationError,
    gather_sharded,
    renew,
    shard_anew,
)
from tracker.surgery import transaction

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def share(rank: int, size: int) -> list[Tensor]:
    """Batches of uneven size; the last of three ranks has none."""
    generator = torch.Generator().manual_seed(5)
    every = [
        torch.randn(n, 6, generator=generator) * (i + 1) for i, n in enumerate((32, 7, 64, 1, 50))
    ]
    return every if size == 1 else [x for i, x in enumerate(every) if i % 2 == rank]


def tracked(model: nn.Module, **options: Any) -> NeuronEngine:
    engine = NeuronEngine()
    engine.track_model(
        model, "m", example_inputs=torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    )
    if "optimizer" in options:
        engine.attach_optimizer(options["optimizer"])
    return engine


def observe(rank: int, size: int) -> dict[str, Any]:
    model = network()
    engine = tracked(model)
    if size > 1:
        engine.attach_process_group()
    engine.start_tracking(enable_correlation_analysis=True)
    for x in share(rank, size):
        model(x)
    if size > 1:
        engine.merge_statistics()
        engine.merge_statistics()  # nothing was observed since: nothing counts twice
    engine.stop_tracking()
    names = (
        "mean",
        "variance",
        "firing_frequency",
        "min_activation",
        "max_activation",
        "observations",
    )
    table = [[float(s[n]) for n in names] for s in engine.get_dataset_statistics().values()]
    pairs = engine.find_redundant_neurons(0.3)
    if size > 1:
        engine.start_tracking()
        model(torch.ones(3, 6))
        engine.merge_statistics()
        assert engine.get_neuron_stats(0)["observations"] == 3 * size
    return {
        "table": torch.tensor(table, dtype=torch.float64),
        "samples": engine.get_summary()["total_neurons"],
        "pairs": sorted((a, b, c) for found in pairs.values() for a, b, c in found),
    }


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def change(rank: int, size: int, unused: bool) -> dict[str, Any]:
    """Every change in a row, with steps between them, under DistributedDataParallel."""
    model = network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = tracked(wrapped, optimizer=optimizer)
    engine.attach_process_group()
    engine.calibrate(share(rank, size))
    refused = 0

    def step(seed: int) -> None:
        torch.manual_seed(seed * 10 + rank)
        wrapped(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    for number, act in enumerate(
        (
            lambda: engine.prune_neurons({"0": [1, 2]}),
            lambda: engine.expand_layer("2", 3),
            lambda: engine.merge_neurons([(3, 4)]),
            lambda: engine.compress(0.7, of="neurons", progress=False),
            lambda: engine.recycle_neurons({"0": [0]}),
            lambda: engine.insert_layer(after="0"),
        )
    ):
        act()
        with pytest.raises(SurgeryError, match="renew"):
            wrapped(torch.randn(8, 6))
        refused += 1
        wrapped = renew(wrapped)
        step(number + 1)
    assert wrapped.find_unused_parameters is unused
    return {"weights": weights(model), "refused": refused, "journal": str(len(engine.journal))}


@pytest.mark.parametrize("unused", [False, True])
def test_ranks_change_alike(unused: bool, tmp_path: Path) -> None:
    found = run(2, tmp_path, change, unused)
    assert all(len(f["weights"]) == len(found[0]["weights"]) for f in found)
    for a, b in zip(found[0]["weights"], found[1]["weights"], strict=True):
        assert torch.equal(a, b)
    assert found[0]["refused"] == 6


def fail(rank: int, size: int) -> list[str]:
    """One rank fails, at different places; none changes."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    engine = tracked(model, optimizer=optimizer)
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    engine.attach_process_group()
    before, ids = weights(model), engine.track_model(model)
    told = []

    def refused(act: Any) -> None:
        with pytest.raises(TrackerError) as caught:
            act()
        told.append(f"{type(caught.value).__name__}: {caught.value}")
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert ids == engine.track_model(model)
        assert len(engine.journal) == 0

    refused(lambda: engine.prune_neurons([99_999] if rank == 1 else [1]))
    refused(lambda: engine.prune_units({"0": [rank + 1]}))
    whole = transaction._as_expected

    def broken(*args: Any) -> None:
        raise VerificationError("the last check failed")

    if rank == size - 1:
        transaction._as_expected = broken
    refused(lambda: engine.prune_units({"0": [1, 2]}))
    transaction._as_expected = whole
    moment = optimizer.state[model[2].weight]["exp_avg"]
    moment += rank
    refused(lambda: engine.prune_units({"0": [1, 2]}))
    refused(engine.attach_process_group)
    moment -= rank
    with torch.no_grad():
        model[0].weight[0, 0] += rank
    before = weights(model)
    refused(lambda: engine.prune_units({"0": [1, 2]}))
    return told


def observe_and_fail(rank: int, size: int) -> dict[str, Any]:
    return {"observed": observe(rank, size), "told": fail(rank, size)}


@pytest.mark.parametrize("size", [2, 3])
def test_what_one_saw_all_saw_and_all_change_or_none(size: int, tmp_path: Path) -> None:
    alone = observe(0, 1)
    for rank, both in enumerate(run(size, tmp_path, observe_and_fail)):
        found, told = both["observed"], both["told"]
        assert torch.allclose(found["table"], alone["table"], rtol=1e-6, atol=1e-9)
        assert [p[:2] for p in found["pairs"]] == [p[:2] for p in alone["pairs"]]
        assert [p[2] for p in found["pairs"]] == pytest.approx(
            [p[2] for p in alone["pairs"]], abs=1e-6
        )
        assert "99999" in told[0]
        assert "rank 1" in told[0] or rank == 1
        assert "plan of prune_units of rank 1 is not that of rank 0" in told[1]
        assert "the last check failed" in told[2]
        assert f"rank {size - 1}" in told[2] or rank == size - 1
        assert "The state of optimizer 0 of rank 1" in told[3]
        assert "The state of optimizer 0 of rank 1" in told[4]
        assert "The model of rank 1" in told[5]


GROW = Policy(
    warm_up=10, every=20, look=6, settle=8, tolerance=0.02, floor=2, grow=True, plateau=1.0,
    max_parameters=500,
)  # fmt: skip
MORE = {
    "merge": replace(GROW, merge=True, tolerance=0.3),
    "insert": replace(GROW, shrink=False, grow=False, insert=2, max_parameters=None),
    "drop": replace(GROW, drop=0.9, shrink=False, grow=False),
    "latency": replace(GROW, grow=False, tolerance=0.0, max_latency=1e-4),
}


def live(rank: int, size: int, policy: Policy = GROW) -> dict[str, Any]:
    """A run that modifies itself, on its share of each batch."""
    model = network()
    wrapped: nn.Module = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    engine = tracked(wrapped, optimizer=optimizer)
    if size > 1:
        engine.attach_process_group()
    engine.start_self_modification(policy)
    engine.correlation_threshold = 0.5
    generator = torch.Generator().manual_seed(3)
    for _ in range(80):
        x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
        loss = (wrapped(x[rank::size]) - y[rank::size]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if engine.step(loss) is not None and size > 1:
            wrapped = renew(wrapped)
    return {
        "weights": weights(model),
        "life": [[d.step, d.what, d.parameters, sorted(d.widths.items())] for d in engine.life],
        "losses": engine.life[-1].loss,
    }


def test_one_machine_or_two_the_same_life(tmp_path: Path) -> None:
    alone = live(0, 1)
    found = run(2, tmp_path, live)
    for a, b in zip(found[0]["weights"], found[1]["weights"], strict=True):
        assert torch.equal(a, b)
    assert found[0]["life"] == found[1]["life"]
    assert [d[:2] for d in found[0]["life"]] == [d[:2] for d in alone["life"]]
    assert len({d[2] for d in alone["life"]}) > 1
    assert found[0]["life"] == alone["life"]
    for a, b in zip(found[0]["weights"], alone["weights"], strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def live_more(rank: int, size: int) -> dict[str, Any]:
    return {name: live(rank, size, policy) for name, policy in MORE.items()}


def test_all_ranks_live_alike_whatever_the_policy_does(tmp_path: Path) -> None:
    first, second = run(2, tmp_path, live_more)
    done = {"merge": "merged", "insert": "inserted", "drop": "dropped", "latency": "pruned"}
    for name, what in done.items():
        assert what in {d[1] for d in first[name]["life"]}, first[name]["life"]
        assert first[name]["life"] == second[name]["life"]
        for a, b in zip(first[name]["weights"], second[name]["weights"], strict=True):
            assert torch.equal(a, b)


def shard(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=torch.randn(4, 6))
    engine.start_tracking()
    model(torch.randn(8, 6))
    seen = engine.get_neuron_stats(0)["observations"]
    with pytest.raises(StructureError) as caught:
        engine.prune_units({"0": [1]})
    return [str(seen), str(caught.value)]


def test_sharded_models_are_watched_and_not_changed(tmp_path: Path) -> None:
    for seen, why in run(2, tmp_path, shard):
        assert seen == "8"
        assert "sharded" in why


def reshard(rank: int, size: int) -> dict[str, Any]:
    """Spread, gathered, changed, spread anew, three times over; with one process: never spread."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = network()
    whole_optimizer = torch.optim.AdamW(whole.parameters(), 1e-2)
    engine = tracked(whole, optimizer=whole_optimizer)
    first = engine.track_model(whole)
    if size > 1:
        engine.attach_process_group()

    def shard(model: Any) -> None:
        mesh = init_device_mesh("cpu", (size,))
        for part in (model[0], model[2], model[4], model):
            fully_shard(part, mesh=mesh)

    generator = torch.Generator().manual_seed(3)
    losses: list[float] = []

    def train(model: nn.Module, optimizer: Any) -> None:
        for _ in range(5):
            x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    told = ""
    if size > 1:
        with pytest.raises(SurgeryError, match="cannot go to SGD"):
            shard_anew(whole, whole_optimizer, shard, lambda p: torch.optim.SGD(p, 0.1))
    for act in (
        lambda: engine.prune_neurons({"0": [1, 2, 3]}, compensate=False),
        lambda: engine.expand_layer("2", 4, seed=1),
        lambda: engine.merge_neurons([(first["2"][0], first["2"][1])]),
        lambda: engine.insert_layer(after="0"),
    ):
        model, optimizer = whole, whole_optimizer
        if size > 1:
            model, optimizer = shard_anew(
                whole, whole_optimizer, shard, lambda p: torch.optim.AdamW(p, 3.0)
            )
            assert all(hasattr(p, "placements") for p in model.parameters())
        train(model, optimizer)
        if size > 1:
            gather_sharded(model, optimizer, whole, whole_optimizer)
        act()
        if size > 1 and not told:
            with pytest.raises(SurgeryError, match="one architecture") as caught:
                gather_sharded(model, optimizer, whole, whole_optimizer)
            told = str(caught.value)
    assert len(engine.journal) == 4
    kept = set(first["0"]) & set(engine.track_model(whole)["0"])
    train(whole, whole_optimizer)
    return {"weights": weights(whole), "losses": losses, "kept": len(kept)}


def test_sharded_models_are_gathered_changed_and_spread_anew(tmp_path: Path) -> None:
    """As if there had been one process all the time: losses, weights, optimizer's state, ages of new units, ids."""
    alone = reshard(0, 1)
    assert alone["kept"] == 17
    for found in run(2, tmp_path, reshard):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["kept"] == 17
        for a, b in zip(found["weights"], alone["weights"], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def inner_module(rank: int, size: int) -> dict[str, Any]:
    """Changes without a group; then with one, the module inside the wrapper being tracked."""
    model = network()
    engine = tracked(model)
    x = torch.randn(4, 6)
    told = []
    for call in (lambda: engine.expand_layer("0", 2), engine.start_self_modification):
        with pytest.raises(SurgeryError, match="attach_process_group") as caught:
            call()
        told.append(str(caught.value))
    dry = engine.expand_layers({"0": 2}, dry_run=True).parameters_after
    engine.attach_process_group()
    wrapper = DistributedDataParallel(model)
    wrapper(x).sum().backward()
    engine.expand_layer("0", 2)
    with pytest.raises(SurgeryError, match="renew"):
        wrapper(x)
    wrapper = renew(wrapper)
    wrapper(x).sum().backward()
    engine.undo()
    with pytest.raises(SurgeryError, match="renew"):
        wrapper(x)
    return {"told": len(told), "dry": dry}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_rank_changes_alone_and_no_wrapper_goes_stale_unseen(tmp_path: Path) -> None:
    for found in run(2, tmp_path, inner_module):
        assert found["told"] == 2
        assert found["dry"] > sum(p.numel() for p in network().parameters())


def test_without_other_processes_it_says_so() -> None:
    engine = tracked(network())
    with pytest.raises(SurgeryError, match="init_process_group"):
        engine.attach_process_group()
    with pytest.raises(SurgeryError, match="attach_process_group"):
        engine.merge_statistics()
    with pytest.raises(SurgeryError, match="DistributedDataParallel"):
        renew(network())  # type: ignore[arg-type]

"""Two processes with DistributedDataParallel: both change alike, and go on."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tracker
from tracker import NeuronEngine, Policy

STEPS = 120


def run(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    engine = NeuronEngine()
    engine.track_model(model, "net", example_inputs=torch.randn(16, 6))
    engine.attach_optimizer(optimizer)
    engine.attach_process_group()
    engine.start_self_modification(Policy(tolerance=0.01), steps=STEPS)
    random = torch.Generator().manual_seed(rank)  # each rank its share of the data
    for _ in range(STEPS):
        x = torch.randn(32, 6, generator=random)
        loss = (model(x) - x[:, :3].relu()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if engine.step(loss) is not None:
            model = tracker.renew(model)
    widths = torch.tensor([network[0].out_features])
    every = [torch.zeros_like(widths) for _ in range(ranks)]
    dist.all_gather(every, widths)
    assert len(set(map(int, every))) == 1
    assert int(widths) < 64
    if rank == 0:
        print(f"both ranks have {int(widths)} of 64 neurons; {len(engine.journal)} changes")
        print(engine.journal)
    dist.barrier()  # DistributedDataParallel keeps gloo's threads; at exit none may hold a tensor of Python's
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (2, os.path.join(folder, "store")), nprocs=2)

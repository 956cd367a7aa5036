"""Several processes on this machine, joined by gloo, each of which runs one function."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server that imports all once and has no threads is forked for each rank; where there are none, each imports anew.
START = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def _enter(
    rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=60), rank=rank, world_size=size
    )
    try:
        torch.save(function(rank, size, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except BaseException:
        Path(f"{folder}/{rank}.txt").write_text(traceback.format_exc())
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may otherwise end the process with an error


def run(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, size, *args)` returns on each rank: plain data and tensors."""
    context: Any = mp.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(
            ["torch._dynamo", "torch.distributed.fsdp", "tracker", function.__module__]
        )
    processes = [
        context.Process(target=_enter, args=(rank, size, str(folder), function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    failed = [p.read_text() for p in sorted(folder.glob("*.txt"))]
    assert not failed, failed[0]
    assert all(process.exitcode == 0 for process in processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]

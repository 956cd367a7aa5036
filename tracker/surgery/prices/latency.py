"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import forward_once

PASSES, WARM_UP = 11, 2


def latency(model: nn.Module, inputs: Arguments, passes: int = PASSES) -> float:
    """Milliseconds of a forward pass in eval mode, without gradients: the median of so many, after two of warm-up.

    Wall time of the call alone, with torch's threads as they are, to the end of what it started on a GPU.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    times = []
    for _ in range(WARM_UP + passes):
        clock = _Clock(devices)
        forward_once(model, inputs, within=clock)
        times.append(clock.seconds)
    return 1e3 * statistics.median(times[WARM_UP:])


class _Clock:
    def __init__(self, devices: set[torch.device]) -> None:
        self._devices, self.seconds = devices, 0.0

    def _now(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self._start

"""Times of the parts of tracking, each beside the plain operation that reads or multiplies the same data."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tracker.statistics import ActivityStream, Covariance, CovarianceStream, Scratch
from tracker.statistics.native import kernel
from tracker.statistics.native.build import capability

SHAPES: dict[tuple[int, ...], torch.dtype] = {
    (64, 512): torch.float32,
    (512, 512): torch.float32,
    (1024, 768): torch.float32,
    (1024, 3072): torch.float32,
    (1024, 3070): torch.bfloat16,
    (32, 64, 32, 32): torch.float32,
    (32, 256, 7, 7): torch.float32,
    (32, 512, 2, 2): torch.float32,
}
WIDTHS = (64, 256, 512, 1024, 4096)
ROWS, BATCH = 4096, 512
ROUNDS = 15


def machine() -> str:
    """Processor, cores, and versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    code = f"compiled code for {capability()}" if kernel() else "no compiled code"
    return (
        f"{name} ({platform.machine()}), {os.cpu_count()} cores, {code}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )


def together(*calls: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each call, taken in turn; short calls are repeated."""
    repeats = []
    for call in calls:
        call()
        start, n = time.thread_time(), 0
        while time.thread_time() - start < 0.004:
            call()
            n += 1
        repeats.append(n)
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, n, seconds in zip(calls, repeats, spent, strict=True):
            start = time.thread_time()
            for _ in range(n):
                call()
            seconds.append((time.thread_time() - start) / n)
    return [statistics.median(seconds) for seconds in spent]


def streams(neurons: int) -> tuple[ActivityStream, ActivityStream]:
    """One of compiled code, one of torch alone."""
    with patch("tracker.statistics.stream.kernel", lambda: None):
        by_torch = ActivityStream(neurons, 0.01)
    return ActivityStream(neurons, 0.01), by_torch


@torch.no_grad()
def straightforward(x: Tensor) -> None:
    """The same numbers by torch's own reductions over a batch."""
    rows = x.movedim(1, -1).flatten(0, -2)
    torch.var_mean(rows, 0, correction=0)
    torch.aminmax(rows, dim=0)
    (rows.abs() > 0.01).sum(0)
    (rows == 0).sum(0)


def kernels() -> Iterator[str]:
    """A table, line by line."""
    yield "| output | `x.sum(0)` | compiled | by torch | straightforward |"
    yield "|---|---|---|---|---|"
    scratch = Scratch()
    for shape, dtype in SHAPES.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu_()
        plain, x = x.view(shape[0], -1), x.to(dtype)
        compiled, by_torch = streams(shape[1])
        limit, *others = together(
            lambda plain=plain: plain.sum(0),
            lambda x=x, stream=compiled: stream.add(x, 1, scratch),
            lambda x=x, stream=by_torch: stream.add(x, 1, scratch),
            lambda x=x: straightforward(x),
        )
        cells = " | ".join(f"{seconds / limit:.2f}" for seconds in others)
        kind = " bfloat16" if dtype == torch.bfloat16 else ""
        yield f"| {' × '.join(map(str, shape))}{kind} | {1e6 * limit:.0f} µs | {cells} |"


def covariances() -> Iterator[str]:
    """A table, line by line."""
    yield "| neurons | one XᵀX | compiled | by torch |"
    yield "|---|---|---|---|"
    for neurons in WIDTHS:
        x = torch.randn(ROWS, neurons, generator=torch.Generator().manual_seed(0)) + 1
        batches = [(b, b.double().mean(0)) for b in x.split(BATCH)]
        with patch("tracker.statistics.covariance.kernel", lambda: None):
            by_torch = CovarianceStream(neurons)
        compiled, product = CovarianceStream(neurons), torch.empty(neurons, neurons)

        def feed(stream: CovarianceStream, batches: list[tuple[Tensor, Tensor]] = batches) -> None:
            for batch, mean in batches:
                stream.add(batch, mean)

        limit, ours, theirs = together(
            lambda x=x, product=product: torch.mm(x.T, x, out=product),
            lambda stream=compiled: feed(stream),
            lambda stream=by_torch: feed(stream),
        )
        yield f"| {neurons} | {1e3 * limit:.1f} ms | {ours / limit:.2f} | {theirs / limit:.2f} |"


def pair_search() -> str:
    """A sentence."""
    found = Covariance.of(torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)))
    (seconds,) = together(lambda: found.pairs_above(0.9))
    return f"The search for all pairs above 0.9 among 4,096 neurons takes {1e3 * seconds:.0f} ms (limit: 20 ms)."


class Given(nn.Module):
    """A layer that takes no time: its output is there."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """The output; x is not read."""
        return self.output


def profile(hooked: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[str]:
    """What the tracking of one small output consists of, and the fixed part of a call: sentences.

    hooked: Inside, a model is tracked.
    """
    torch.manual_seed(0)
    outputs = [torch.randn(64, n) for n in (512, 512, 256, 256, 10)]
    model, x = nn.Sequential(*map(Given, outputs)), outputs[0]
    own = [(ActivityStream(out.shape[1], 0.01), out) for out in outputs]
    one, scratch = (ActivityStream(8, 0.01), torch.randn(1, 8)), Scratch()
    with torch.no_grad():
        (bare,) = together(lambda: model(x))
        handles = [layer.register_forward_hook(lambda m, a, out: None) for layer in model]
        (empty,) = together(lambda: model(x))
        for handle in handles:
            handle.remove()
        with hooked(model):
            (tracked,) = together(lambda: model(x))
        (code,) = together(lambda: [stream.add(out, 1, scratch) for stream, out in own])
        fixed, smallest = together(lambda: one[0].add(one[1], 1, scratch), lambda: one[1].sum(0))
    total, compiled, calls = (1e6 * t / len(own) for t in (tracked - bare, code, empty - bare))
    ours, fixed, smallest = total - compiled - calls, 1e6 * fixed, 1e6 * smallest
    yield f"Of the {total:.1f} µs that tracking adds for each output of the MLP at batch 64, {compiled:.1f} µs are the"
    yield f"call of the compiled code, {calls:.1f} µs torch's own for calling any hook, and {ours:.1f} µs this"
    yield "library's Python: which layer, which axis, which window. A call of the compiled code takes"
    yield f"{fixed:.1f} µs for eight values, and `x.sum(0)` {smallest:.1f} µs: what small outputs cost is this."

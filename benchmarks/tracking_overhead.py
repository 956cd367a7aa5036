"""What tracking costs: time of a training step with tracking over the bare step's, side by side in one run.

All leaf modules are hooked and all statistics taken: by this library with compiled code and by torch alone, and by a
straightforward hook (`var_mean`, `aminmax`, sums of bools). The variants take turns on the same model and the same
data, a few steps each, so that a drift of the machine's speed hits them alike; the figure is the median of the ratios
of neighbouring groups of steps. The bare step takes part twice: what its second turn differs by is noise.

    python benchmarks/tracking_overhead.py --write
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks._kernels import covariances, kernels, machine, pair_search, profile
from tracker.modules.layers import Layer
from tracker.observation.hooks import ObservationPoint, Observer, attach, detach_points

THRESHOLD = 0.01


class Block(nn.Module):
    """A pre-norm transformer block of width `d`."""

    def __init__(self, d: int, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.GELU(),
            nn.Linear(4 * d, d),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, positions, d)."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(self.act(self.up(self.norm2(x))))


@dataclass(frozen=True)
class Workload:
    """A model, and the shape of its input."""

    title: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    rounds: int
    group: int  # steps in a row: some of the work is done every few steps only, and must be in
    targets: tuple[
        float, float, float
    ]  # one thread, compiled code: without, with correlation, of 1/8


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18()


WORKLOADS = {
    "A64": Workload("MLP 784-512-256-10, batch 64", mlp, (64, 784), 40, 16, (1.05, 1.40, 1.18)),
    "A512": Workload("MLP 784-512-256-10, batch 512", mlp, (512, 784), 24, 8, (1.03, 1.45, 1.10)),
    "B": Workload(
        "ResNet-18 at 64×64, batch 32", resnet, (32, 3, 64, 64), 16, 1, (1.03, 1.22, 1.08)
    ),
    "C": Workload(
        "4 transformer blocks, d=768, sequence 256, batch 4",
        lambda: nn.Sequential(*(Block(768) for _ in range(4))),
        (4, 256, 768),
        8,
        1,
        (1.015, 1.75, 1.16),
    ),
}


def leaf_layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """All leaf modules, activations too, as layers: channels of maps, else the last axis."""
    found: list[Layer] = []
    names = {m: n for n, m in model.named_modules() if not list(m.children())}

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        axis = 1 if out.ndim == 4 else -1
        found.append(Layer(names[module], module, type(module).__name__, out.shape[axis], axis))

    handles = [m.register_forward_hook(note) for m in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    # A module that is called twice is one layer.
    return list({layer.name: layer for layer in found}.values())


Variant = Callable[[nn.Module, list[Layer]], AbstractContextManager[None]]


class Tracked:
    """This library's hooks; the statistics go on from step to step."""

    def __init__(self, correlate: bool = False, compiled: bool = True, sampling: int = 1) -> None:
        self.correlate, self.compiled, self.sampling = correlate, compiled, sampling
        self.observer: Observer | None = None

    @contextmanager
    def __call__(self, model: nn.Module, layers: list[Layer]) -> Iterator[None]:
        if self.observer is None:
            points = [ObservationPoint(layer) for layer in layers]
            self.observer = Observer(weakref.ref(model), points, THRESHOLD)
            self.observer.recording, self.observer.correlate = True, self.correlate
            self.observer.sampling = self.sampling
        handles = attach(self.observer, model)
        with ExitStack() as stack:
            for room in () if self.compiled else ("stream", "covariance"):
                stack.enter_context(patch(f"tracker.statistics.{room}.kernel", lambda: None))
            yield
        for handle in handles:
            handle.remove()
        detach_points(self.observer)


class PlainStatistics:
    """What anyone would write first: torch's own reductions over one output, merged in float64."""

    def __init__(self, axis: int) -> None:
        self.axis, self.n = axis, 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: object, out: Tensor) -> None:
        x = out.movedim(self.axis, -1).flatten(0, -2)
        n = x.shape[0]
        variance, mean = torch.var_mean(x, 0, correction=0)
        low, high = torch.aminmax(x, dim=0)
        fired, zeros = (x.abs() > THRESHOLD).sum(0), (x == 0).sum(0)
        mean, m2 = mean.double(), variance.double() * n
        if self.n:
            delta, total = mean - self.mean, self.n + n
            m2 = self.m2 + m2 + delta.square() * (self.n * n / total)
            mean = self.mean + delta * (n / total)
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
            fired, zeros = fired + self.fired, zeros + self.zeros
        self.n, self.mean, self.m2 = self.n + n, mean, m2
        self.low, self.high, self.fired, self.zeros = low, high, fired, zeros


class Straightforward:
    """The plain statistics, hooked to the same modules."""

    def __init__(self) -> None:
        self.hooks: dict[str, PlainStatistics] = {}

    @contextmanager
    def __call__(self, model: nn.Module, layers: list[Layer]) -> Iterator[None]:
        handles = []
        for layer in layers:
            hook = self.hooks.setdefault(layer.name, PlainStatistics(layer.axis))
            handles.append(layer.module.register_forward_hook(hook))
        yield
        for handle in handles:
            handle.remove()


@contextmanager
def bare(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """No hook at all."""
    yield


def fresh_variants(correlation: bool) -> dict[str, Variant]:
    """The variants, nothing observed yet."""
    variants: dict[str, Variant] = {
        "bare": bare,
        "tracked": Tracked(),
        "bare again": bare,
        "by torch": Tracked(compiled=False),
        "straightforward": Straightforward(),
    }
    if correlation:
        variants |= {
            "correlation": Tracked(correlate=True),
            "of 1/8": Tracked(correlate=True, sampling=8),
            "correlation by torch": Tracked(correlate=True, compiled=False),
        }
    return variants


def compare(work: Workload, variants: dict[str, Variant], scale: float) -> dict[str, list[float]]:
    """Seconds of groups of steps, the variants in turn."""
    torch.manual_seed(0)
    model = work.build()
    x = torch.randn(work.inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    layers = leaf_layers(model, x)
    # CPU time counts what a busy machine takes away less than wall time; with threads only the wall tells.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def group() -> float:
        start = clock()
        for _ in range(work.group):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return clock() - start

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rounds = max(3, round(work.rounds * scale))
    for round_ in tqdm(range(rounds + 1), desc=work.title, leave=False, disable=None):
        for name, variant in variants.items():
            with variant(model, layers):
                spent = group()
            if round_:  # the first round warms up
                seconds[name].append(spent)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median and quartiles of the time over the bare one, round by round."""
    values = [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def steps(options: argparse.Namespace) -> Iterator[str]:
    """The table of steps, line by line."""
    names = [name for name in fresh_variants(options.correlation) if name != "bare"]
    yield f"| workload | threads | bare step | {' | '.join(names)} | limits, 1 thread |"
    yield "|---|---|---|" + "---|" * (len(names) + 1)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for key in options.workloads:
            work = WORKLOADS[key]
            seconds = compare(work, fresh_variants(options.correlation), options.scale)
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*ratios(seconds, name)) for name in names]
            step = f"{1000 * statistics.median(seconds['bare']) / work.group:.1f} ms"
            limits = "{}, correlation {:.2f}, of 1/8 {:.2f}".format(*work.targets)
            yield f"| {work.title} | {threads} | {step} | {' | '.join(cells)} | {limits} |"


@contextmanager
def tracked_alone(model: nn.Module) -> Iterator[None]:
    """Inside, all layers of a chain are tracked."""
    layers = leaf_layers(model, torch.randn(64, 784))
    with Tracked()(model, layers):
        yield


def page(options: argparse.Namespace) -> Iterator[str]:
    """docs/performance.md, line by line."""
    yield from ("# Performance", "")
    yield f"Written by `python benchmarks/tracking_overhead.py --write` on {time.strftime('%Y-%m-%d')}: {machine()}."
    yield "CPU time, one thread, medians; in brackets the quartiles. The machine is shared: *bare again* is its noise."
    yield from ("", "## A training step", "")
    yield "Time of a step (forward, backward, SGD) over the bare step's. All leaf modules are hooked, activations too,"
    yield "and all statistics taken. *tracked*: with compiled code; *by torch*: what answers without a compiler;"
    yield "*straightforward*: a hook of `var_mean`, `aminmax` and sums of bools, which anyone would write first;"
    yield "*correlation*: the covariance of all pairs of every layer's neurons as well; *of 1/8*: of one row of eight"
    yield "(where batches are small, of one batch of eight)."
    yield "With two threads wall time, and limits 0.03 above: there products of layers below 256 neurons, most of a"
    yield "ResNet's, stay on one thread, beside a step that takes half the time."
    yield ""
    yield from steps(options)
    torch.set_num_threads(1)
    yield from ("", "## One pass over an activation", "")
    yield "All seven statistics of a float32 output (bfloat16 where it says so), merged into the table, over the time"
    yield "of `x.sum(0)` of the same values in float32, which reads them once and adds them up. Limit: 2.2."
    yield ""
    yield from kernels()
    yield ""
    yield from profile(tracked_alone)
    yield from ("", "## Correlation", "")
    yield "The co-moments of 4,096 rows in batches of 512, centring and float64 sums included, over the time of one"
    yield "float32 product XᵀX of the same rows by torch. Limits: 1.05 below 1,024 neurons, 0.75 from there on."
    yield ""
    yield from covariances()
    yield ""
    yield pair_search()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--no-correlation", dest="correlation", action="store_false")
    parser.add_argument("--scale", type=float, default=1.0, help="more or fewer rounds")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()

    lines = []
    for line in page(options):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        path = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

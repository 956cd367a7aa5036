"""What consumers read: the covariance of their inputs, streamed over calibration data or taken from the window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tracker.compensation.linear import EXACT
from tracker.inputs.batches import EXAMPLE, Batch
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import kind_of
from tracker.observation.compiled import GraphHook, forget_compiled_graphs, is_new_data
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.statistics import Covariance
from tracker.structure import UnitGroup
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery.calibration.covariance_collector import CovarianceCollector
from tracker.surgery.calibration.curvature import CurvatureWatcher, eager
from tracker.surgery.calibration.loss import Objective
from tracker.tracker import ActivationTracker
from tracker.utils.nested import tensors_in

GRADIENTS = 64  # batches that are sent back as well
PATCHES = (
    4096  # rows of a batch that a convolution's patches give, or four for each of their columns
)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A module that multiplies its input with a weight of its own, and adds a bias.

    reads, makes: Dimensions of `weight` along its input features, and along its outputs.
    axis: Of its input, along which the features lie.
    bias: Its key, or None where there is none that could take a constant over.
    padded: With zeros: near the border a constant that it reads is none, and the bias takes it over inside only.
    """

    module: str
    weight: str
    reads: int
    makes: int
    axis: int
    bias: str | None
    padded: bool = False

    def fits(self, read: ConsumerInput, weight: Tensor) -> bool:
        """Whether that is what it reads."""
        return len(read.covariance.mean) == weight.shape[self.reads] * read.kernel_positions

    def matrix(self, weight: Tensor, kernel_positions: int) -> Tensor:
        """Its weight as a matrix whose columns are those of what it reads: (rows, columns) float64."""
        whole = weight.detach().double().cpu()
        return (
            whole.movedim(self.reads, -1).flatten(0, -2)
            if kernel_positions == 1
            else whole.flatten(1)
        )

    def passes_on(self, shift: Tensor, second_moment: Tensor) -> bool:
        """Whether constants for features of such second moments can be taken over exactly."""
        return not self.padded or bool((shift.square() <= EXACT * second_moment).all())


def consumer(model: nn.Module, place: tuple[str, int]) -> Consumer | str:
    """The consumer that reads with dimension `place[1]` of the weight `place[0]`, or why it cannot take over."""
    weight, dim = place
    name, _, attribute = weight.rpartition(".")
    module: Any = model.get_submodule(name)
    kind = kind_of(module)
    if kind is None or kind.reads is None:
        return f"{name} is a {type(module).__name__}"
    if attribute != kind.weight or attribute not in module._parameters:
        return f"{weight} is not the weight of a layer"
    own = module._parameters[attribute]
    owners = sum(p is own for m in model.modules() for p in m._parameters.values() if p is not None)
    if owners > 1:
        return f"{weight} is tied: what else it does would change"
    if why := kind.why_not(module):
        return f"{name} {why}"
    has_bias = kind.bias is not None and getattr(module, kind.bias, None) is not None
    # Where zeros are padded, a constant is a bias inside the map only.
    padding = getattr(module, "padding", "valid") if isinstance(module, _ConvNd) else "valid"
    padded = padding != "valid" and any(padding) and module.padding_mode == "zeros"
    found = Consumer(
        name,
        weight,
        kind.reads(module),
        kind.makes(module),
        kind.axis(module),
        f"{name}.{kind.bias}" if has_bias else None,
        padded,
    )
    return found if dim == found.reads else f"{weight} does not read along dimension {dim}"


def consumers(model: nn.Module, groups: Iterable[UnitGroup]) -> tuple[list[Consumer], list[str]]:
    """All consumers of these groups that can take over, and why others cannot."""
    found: dict[str, Consumer] = {}
    problems: list[str] = []
    for group in groups:
        for place, role in group.roles.items():
            if role == "reads":
                one = consumer(model, place)
                if isinstance(one, Consumer):
                    found[one.weight] = one
                else:
                    problems.append(one)
    return list(found.values()), list(dict.fromkeys(problems))


def reads_of(
    tracker: ActivationTracker, wanted: Iterable[Consumer], *, example: bool = True
) -> dict[str, ConsumerInput]:
    """What these consumers read: calibrated, else from the window, else (if `example`) on the example inputs."""
    entry = tracker.current
    found = dict(entry.reads)
    missing = [c for c in wanted if c.weight not in found]
    for one in list(missing):
        seen = _from_window(tracker, one)
        if seen is not None:
            found[one.weight] = ConsumerInput(one.reads, seen)
            missing.remove(one)
    if missing and example:
        passes = tracker.passes()
        for (
            call
        ) in passes.recorded:  # of a head for training, say, only another call than the first tells
            missing = [c for c in missing if c.weight not in found]
            found.update(
                collect(entry.model(), [Batch(call, None, EXAMPLE)], missing) if missing else {}
            )
    return found


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    wanted: Iterable[Consumer],
    *,
    patches: bool = False,
    objective: Objective | None = None,
) -> dict[str, ConsumerInput]:
    """One pass over `batches` in eval mode, calls in theirs; the inputs of these consumers become covariances.

    patches: Convolutions see all that lies under their kernels, not channels alone.
    objective: Also take the curvature of this loss at the consumers' outputs, from gradients of the first GRADIENTS
        batches.
    """
    wanted = list(wanted)
    with temporary_copy(model) if objective is not None else nullcontext(model) as lent:
        quiet = copy_without_hooks(lent)
        watcher = Watcher(quiet, wanted, heard=True, patches=patches)
        if objective is None:
            for batch in batches:
                forward_once(quiet, batch.call, given=batch.what)
            return watcher.stop()
        every = {one.weight: one for one in wanted}
        with CurvatureWatcher(quiet, every, watcher.kernel_positions, objective) as bent, eager():
            for number, batch in enumerate(batches):
                with bent.expecting(batch.given if number < GRADIENTS else None):
                    forward_once(quiet, batch.call, bent.mode(), given=batch.what)
        reads = watcher.stop()
        known = bent.values({weight: read.covariance.mean for weight, read in reads.items()})
        return {weight: replace(read, loss=known.get(weight)) for weight, read in reads.items()}


class Watcher:
    """Hooks that turn the inputs of consumers into covariances, until `stop`.

    heard: Also in passes of our own. most: Rows of one input that are taken, or two for each column, evenly spread; all
    if None.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Iterable[Consumer],
        *,
        heard: bool = False,
        patches: bool = False,
        most: int | None = None,
    ) -> None:
        self._readings, self._most = CovarianceCollector(), most
        self._dims: dict[str, tuple[int, int]] = {}
        self._handles = []
        self._seen = 0
        for one in wanted:
            module = model.get_submodule(one.module)
            kernel_positions = kernel_places(module) if patches else 1
            self._dims[one.weight] = one.reads, kernel_positions

            hook = ReadingHook(self, one, module, kernel_positions, heard=heard)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if not heard:
            forget_compiled_graphs()

    def stop(self) -> dict[str, ConsumerInput]:
        """Take the hooks off; what was seen, by consumer's weight."""
        while self._handles:
            self._handles.pop().remove()
        return self._reads(self._readings.values(release=True))

    def seen(self) -> dict[str, ConsumerInput]:
        """What was seen so far."""
        return self._reads(self._readings.values())

    def _reads(self, values: Mapping[str, Covariance]) -> dict[str, ConsumerInput]:
        return {w: ConsumerInput(self._dims[w][0], c, self._dims[w][1]) for w, c in values.items()}

    @property
    def kernel_positions(self) -> dict[str, int]:
        """Columns of each feature, by consumer's weight."""
        return {weight: kernel_positions for weight, (_, kernel_positions) in self._dims.items()}

    def restore_state(self, seen: Mapping[str, ConsumerInput]) -> None:
        """Have seen this already; of consumers that are no longer watched it is forgotten.

        Raises:
            ValueError: Something else was watched.
        """
        known = {name: read for name, read in seen.items() if name in self._dims}
        for name, read in known.items():
            if self._dims[name] != (read.dim, read.kernel_positions):
                raise ValueError(f"what {name} reads lies along another dimension")
        self._readings.restore_state({name: read.covariance for name, read in known.items()})

    def add(self, one: Consumer, module: nn.Module, kernel_positions: int, tensor: Tensor) -> None:
        """Take one input of a consumer in."""
        rows = (
            _rows(tensor, one.axis, self._most)
            if kernel_positions == 1
            else self._patches(module, tensor)
        )
        moved = one.axis % tensor.ndim != tensor.ndim - 1
        self._readings.add(one.weight, tensor, rows, alone=moved or kernel_positions > 1)

    def _patches(self, module: Any, tensor: Tensor) -> Tensor:
        """Patches under the kernel at a new sample of output positions: (rows, channels · kernel positions)."""
        x = tensor.detach()
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        if len(module.kernel_size) == 1:
            x = x.unsqueeze(-2)
        x = x if x.ndim == 4 else x.unsqueeze(0)
        kernel, dilation, stride = (
            (1, *module.__dict__[name])[-2:] for name in ("kernel_size", "dilation", "stride")
        )
        # Of the places, a share that gives PATCHES rows, offset anew in each batch.
        found = nn.functional.unfold(x, kernel, dilation, 0, stride)
        step = max(1, found.shape[0] * found.shape[2] // max(PATCHES, 4 * found.shape[1]))
        self._seen += 1
        return found.transpose(1, 2).flatten(0, 1)[self._seen * 7 % step :: step]


class ReadingHook(GraphHook):
    """Stands at a consumer's door for a watcher; `heard`: also in passes of our own."""

    def __init__(
        self,
        watcher: Watcher,
        one: Consumer,
        module: nn.Module,
        kernel_positions: int,
        *,
        heard: bool,
    ) -> None:
        super().__init__()
        self._watcher, self._one, self._module, self._kernel_positions = (
            watcher,
            one,
            module,
            kernel_positions,
        )
        self._heard = heard

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Forward pre-hook of the consumer."""
        tensor = tensors_in((args, kwargs))[0]
        if torch.compiler.is_compiling():
            self.in_graph(tensor)
        else:
            self.seen(tensor)

    def seen(self, tensor: Tensor) -> None:
        """Also called from inside a compiled graph."""
        if self._heard or is_new_data():
            self._watcher.add(self._one, self._module, self._kernel_positions, tensor)


def kernel_places(module: nn.Module) -> int:
    """Columns of each channel that a convolution reads patch by patch; 1 where it can't, or is none."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups > 1:
        return 1
    return math.prod(module.kernel_size)


def _rows(tensor: Tensor, axis: int, most: int | None = None) -> Tensor:
    columns = tensor.shape[axis]
    rows = tensor.numel() // max(columns, 1)
    step = 1 if most is None else rows // max(most, 2 * columns)
    if step > 1 and tensor.ndim > 2 and axis % tensor.ndim != tensor.ndim - 1:
        # Before they are copied: positions of every sample.
        moved = tensor.detach().movedim(axis, 1).flatten(2)
        return moved[:, :, step // 2 :: step].transpose(1, 2).reshape(-1, columns)
    moved = tensor.detach().movedim(axis, -1).reshape(-1, columns)
    return moved[step // 2 :: step] if step > 1 else moved


def _from_window(tracker: ActivationTracker, one: Consumer) -> Covariance | None:
    """The covariance of a layer that was observed at this consumer's door."""
    observer = tracker.current.observer
    # Of a sample nothing is exact: a neuron may have fired in a row that was left out.
    for point in observer.points if observer.sampling == 1 else ():
        read_point = point.read_point
        if read_point is not None and read_point.reader == one.module and read_point.positions == 1:
            window = next((w for w in point.windows.values() if w.covariance is not None), None)
            if window is not None and window.covariance is not None:
                value = window.covariance.value()
                if bool((value.count > 1).all()) and bool((value.count == value.count[0]).all()):
                    return value
    return None

"""How the loss bends where consumers put out, from the gradients of ordinary training passes: nothing else is run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import TrackerError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.observation.consumer_inputs import ConsumerInput, Sensitivity
from tracker.surgery.calibration.consumers import Consumer
from tracker.utils.nested import tensors_in

WIDE = 128  # outputs up to which the whole matrix is taken
WITNESSES = 8  # passes on which a change is judged
SOME = 256  # rows of an output that tell what the loss is
FITS = (
    1e-2  # share of the squared gradient that may be left when it is called one of a cross-entropy
)
NEAR = 1e-2  # the same of the scale of a squared error
# Sums over passes: their number, those with a cross-entropy, curvature over loss of these, squared gradients of the
# others, their elements, their rows; squared gradients of all.
FACTS = 7
PASSES, KNOWN, RATIO, SQUARES, ELEMENTS, ROWS, NORM = range(FACTS)


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """One pass of training, and what the loss said of it: enough to measure the loss again.

    Attributes:
        inputs: Of the model.
        shape: Of the output that the loss was taken of.
        targets: Of each row of it, along its last dimension: (rows, 1).
        weights: Of each row in the loss, (rows, 1).
    """

    inputs: Arguments
    shape: torch.Size
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, inputs: Arguments, output: Tensor, gradient: Tensor) -> RecordedPass:
        """What a gradient w·(p − t) tells of a cross-entropy."""
        y, g = output.flatten(0, -2), gradient.flatten(0, -2)
        least, targets = g.min(-1, keepdim=True)
        left = -torch.expm1(y.gather(-1, targets) - y.logsumexp(-1, keepdim=True))
        weights = -least / left.clamp(min=1e-6)
        sure = left < 1e-3  # nothing but rounding tells the weight of these
        usual = weights[~sure].mean() if bool((~sure).any()) else weights.mean()
        return cls(inputs, output.shape, targets, torch.where(sure, usual, weights))

    def losses(self, model: nn.Module) -> Tensor | None:
        """Of each row, weighed: (rows,) float64. By a copy without hooks; None where it puts out something else."""
        outputs = tensors_in(forward_once(model, self.inputs))
        found = next((t for t in outputs if t.shape == self.shape), None)
        if found is None:
            return None
        log_p = found.detach().double().flatten(0, -2).log_softmax(-1)
        return -(self.weights * log_p.gather(-1, self.targets)).flatten()


def losses_of(witnesses: Sequence[RecordedPass], model: nn.Module) -> Tensor | None:
    """Of all rows of some passes, by a model as it is now; None where they cannot be told."""
    try:
        copy = copy_without_hooks(model) if witnesses else model
        found = [w.losses(copy) for w in witnesses]
    except (TrackerError, RuntimeError, ValueError):
        return None
    known = [losses for losses in found if losses is not None]
    return torch.cat(known) if known and len(known) == len(found) else None


class LossWatcher:
    """Sums of g gᵀ over rows and passes, g the gradient at a consumer's output, and of ‖gradient‖² at the model's.

    Both are plain sums, so those of several processes add up to what one process would have seen.

    The empirical Fisher matrix has the shape of the loss's Hessian, and not its scale: it vanishes as a model fits,
    and counts what a batch has in common once for each sample. So only its shape is taken, and the scale is that at
    the model's output, where the Hessian is known: of a cross-entropy w·(diag(p) − p pᵀ) in each row, whose weights
    and targets follow from the gradient itself, of a squared error a constant, which follows from gradient and loss.
    For other losses it is the empirical one, with rows taken for independent. Shapes as in K-FAC (Martens & Grosse,
    2015); what the empirical Fisher lacks: Kunstner et al. (2019).

    sums: By weight, (outputs, outputs) or the diagonal (outputs,), float32, on the model's device. facts: (7,) float64.
    Both are written in place. What runs inside compiled graphs is not seen.
    """

    def __init__(
        self, model: nn.Module, wanted: Sequence[Consumer], sums: dict[str, Tensor], facts: Tensor
    ) -> None:
        self.facts = facts
        self._sent_back = False  # whether the gradient at the model's output came in this pass
        self._early: list[
            tuple[_ConsumerHook, Tensor]
        ] = []  # the model's last layer gets its own first
        self.handles: list[Any] = []
        for one in wanted:
            weight = model.get_parameter(one.weight)
            outputs = weight.shape[one.makes]
            shape = (outputs, outputs) if outputs <= WIDE else (outputs,)
            sums[one.weight] = torch.zeros(shape, device=weight.device)
            module = model.get_submodule(one.module)
            self.handles.append(
                module.register_forward_hook(
                    _ConsumerHook(self, one, sums[one.weight]), prepend=True
                )
            )
        self._last = deque[RecordedPass](maxlen=WITNESSES)
        self.handles.append(model.register_forward_hook(_OutputHook(self), with_kwargs=True))

    @property
    def witnesses(self) -> tuple[RecordedPass, ...]:
        """The last passes that were sent back, where their loss can be measured again."""
        return tuple(self._last)

    def at_output(self, inputs: Arguments, y: Tensor, gradient: Tensor) -> None:
        """The gradient at the model's output came: all others of this pass follow."""
        g = gradient.detach().float()
        norm = g.square().sum()
        self._sent_back = True
        for hook, rows in self._early:
            hook.add(rows)
        self._early = []
        y = y.detach().float()
        known = _cross_entropy(y, g)
        facts = torch.zeros(FACTS, dtype=torch.float64)
        facts[PASSES], facts[NORM] = 1, norm
        if known is not None:
            facts[KNOWN], facts[RATIO], dim = 1, *known
            if dim == -1:
                # Not output and gradient themselves: of a language model they are larger than the model.
                self._last.append(RecordedPass.of(inputs, y, g))
        else:
            facts[SQUARES], facts[ELEMENTS] = norm, g.numel()
            facts[ROWS] = g.flatten(0, -2).any(1).sum() if g.ndim > 1 else 1
        self.facts += facts

    def at_consumer(self, hook: _ConsumerHook, rows: Tensor) -> None:
        """The gradient at a consumer's output came."""
        if self._sent_back:
            hook.add(rows)
        else:
            self._early.append((hook, rows))

    def begin(self) -> None:
        """A pass ended that may be sent back."""
        self._sent_back, self._early = False, []


def with_curvature(
    reads: Mapping[str, ConsumerInput],
    wanted: Sequence[Consumer],
    sums: Mapping[str, Tensor],
    facts: Tensor,
    loss: float,
) -> dict[str, ConsumerInput]:
    """The reads, with the curvature of the loss at what the consumers put out; as they are where no gradients came."""
    scale = loss_curvature(facts, loss)
    if scale is None:
        return dict(reads)
    makes = {one.weight: one.makes for one in wanted}
    found = dict(reads)
    for weight, read in reads.items():
        if weight in sums and bool(sums[weight].isfinite().all()):
            bent = sums[weight].double().cpu() * (scale / float(facts[NORM]))
            found[weight] = replace(read, loss=Sensitivity(bent, makes[weight]))
    return found


def loss_curvature(facts: Tensor, loss: float) -> float | None:
    """Trace of the loss's Hessian at the model's output, a mean over passes; None where no gradients came."""
    passes, known, ratio, squares, elements, rows, norm = facts.tolist()
    size = abs(loss)
    if not passes or not norm or not size or not torch.isfinite(facts).all() or size != size:
        return None
    others = passes - known
    total = ratio * size
    if others:
        squares, elements, rows = squares / others, elements / others, rows / others
        a = squares / (4 * size)  # of a loss a·‖y − target‖²
        usual = (1 / elements, 0.5 / elements, 1 / max(rows, 1), 0.5 / max(rows, 1), 1.0, 0.5)
        squared = any(abs(a - u) <= NEAR * u for u in usual)
        total += others * (2 * a * elements if squared else rows * squares)
    return total / passes if 0 < total < float("inf") else None


def _cross_entropy(output: Tensor, gradient: Tensor) -> tuple[float, int] | None:
    """Trace of its Hessian over its value, and the dimension of its classes, of a loss with a cross-entropy's gradient.

    The gradient of a row is w·(p − t): its only negative entry is that of the target, and tells the weight.
    """
    for dim in (-1, 1) if output.ndim > 2 else (-1,):
        if output.ndim < 2 or output.shape[dim] < 2:
            continue
        y, g = _some(output, dim), _some(gradient, dim)
        norm = g.square().sum()
        if not bool(norm > 0):
            return None
        log_p = y.log_softmax(dim)
        p = log_p.exp()
        least, at = g.min(dim, keepdim=True)
        chosen = p.gather(dim, at)
        weight = -least / (1 - chosen).clamp(min=1e-6)
        fit = (weight * p).scatter_add(dim, at, -weight)
        if bool((g - fit).square().sum() > FITS * norm):
            continue
        value = -(weight * log_p.gather(dim, at)).sum()
        trace = (weight * (1 - p.square().sum(dim, keepdim=True))).sum()
        if bool(value > 0) and bool(trace.isfinite()):
            return float(trace / value), dim
    return None


def _some(tensor: Tensor, dim: int) -> Tensor:
    """About SOME of its rows along `dim`."""
    tensor = tensor.flatten(0, -2) if dim == -1 else tensor
    rows = tensor.numel() // tensor.shape[dim]
    return tensor[:: max(1, min(rows // SOME, len(tensor)))]


class _OutputHook(GraphHook):
    """Waits for the gradient at the model's output."""

    def __init__(self, watcher: LossWatcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        """Forward hook of the model."""
        if torch.compiler.is_compiling() or not is_new_data():
            return
        able = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
        y = next((t for t in able if t.ndim > 1), None)
        self._watcher.begin()
        if y is not None:
            inputs = Arguments(args, dict(kwargs))
            values = y.detach()  # the hook is part of y: y itself would hold itself, for ever
            y.register_hook(lambda gradient: self._watcher.at_output(inputs, values, gradient))


class _ConsumerHook(GraphHook):
    """Adds the products of what is sent back to a consumer."""

    def __init__(self, watcher: LossWatcher, one: Consumer, sums: Tensor) -> None:
        super().__init__()
        self._watcher, self._one, self._sums = watcher, one, sums

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        """Forward hook of the consumer."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if torch.compiler.is_compiling() or not is_new_data():
            return

        def arrived(gradient: Tensor) -> None:
            moved = gradient.detach().movedim(self._one.axis, -1)
            self._watcher.at_consumer(self, moved.reshape(-1, moved.shape[-1]).float())

        output.register_hook(arrived)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """rows: (observations, outputs), float32: their squares vanish only below 1e-19."""
        if self._sums.ndim == 2:
            self._sums.addmm_(rows.T, rows)
        else:
            self._sums += rows.square().sum(0)

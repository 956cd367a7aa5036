"""What the loss of a model is: given by the user, or how far the outputs move; its curvature there, and its value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import SurgeryError
from tracker.inputs.batches import A_BATCH, Batch, BatchReader
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.utils.nested import replaced, tensors_in

Loss = Callable[
    [Any, Any], Tensor
]  # the model's output and its batch → one number, the mean over the batch

GIVEN = "the given loss"
DIVERGENCE = "divergence from the model's own predictions, in nats"
SQUARES = "squared change of the output, relative to its variance"
FITS = 1e-6  # squared relative error up to which a curvature is that of a softmax
PROBES = 4  # for the diagonal of a curvature that is not diagonal


@dataclass(frozen=True, slots=True)
class Probe:
    """A tensor of the output, and a direction at it, of the same shape."""

    at: Tensor
    direction: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """What an error of the model is measured by.

    loss: `loss(output, batch)`, with the batch as it was given, targets too. Without one, the loss is the divergence
        (KL) from the model's own predictions where the outputs are logits (an attribute or key `logits`) or
        log-probabilities; else the relative squared change.
    """

    loss: Loss | None = None

    def check(self, output: Any, batch: Any) -> None:
        """See that the loss takes such outputs.

        Raises:
            SurgeryError: It does not, or gives no number.
        """
        if self.loss is None:
            return
        try:
            with torch.no_grad():
                value = self.loss(output, batch)
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except Exception as error:
            raise SurgeryError(
                f"loss(output, batch) failed ({type(error).__name__}: {error}). It is given what the model puts out, "
                "and the batch as it was passed, targets too."
            ) from error
        if not isinstance(value, Tensor):
            raise SurgeryError(f"loss(output, batch) gives a tensor of one number, not {number!r}.")

    def probe(self, output: Any, batch: Any, generator: torch.Generator) -> list[Probe]:
        """Random directions at the output whose second moment is the Hessian of the loss there.

        What they give, sent back through the network, has as its second moment the Gauss-Newton matrix of the loss:
        its Hessian but for the network's own curvature (Martens, 2020). The loss is taken per row as a softmax with a
        cross-entropy, with any weights of the rows, where it is one; else the diagonal of its Hessian is taken, which
        is all of it for losses that are sums over elements.
        """
        if self.loss is not None:
            found = _curvature_of(self.loss, output, batch, generator)
            if found:
                return found
        logits = _logits(output)
        if logits is not None:
            y = logits.detach()
            weight = torch.full_like(y[..., :1], 1.0 / max(y[..., 0].numel(), 1))
            return [Probe(logits, _softmax_root(y, weight, -1, generator))]
        return [
            Probe(tensor, _signs(tensor, generator) * (2.0 / _spread(tensor.detach())) ** 0.5)
            for tensor in _measured(output)
        ]

    def value(self, model: nn.Module, batches: Iterable[Batch], original: nn.Module) -> float:
        """Mean loss of a model over batches; without a loss, how far its outputs are from those of the original."""
        quiet, total, count = copy_without_hooks(model), 0.0, 0
        reference = None if self.loss is not None else copy_without_hooks(original)
        for batch in batches:
            count += 1
            output = forward_once(quiet, batch.call, given=A_BATCH)
            if self.loss is not None:
                with torch.no_grad():
                    total += float(self.loss(output, batch.given))
            else:
                assert reference is not None
                total += _apart(output, forward_once(reference, batch.call, given=A_BATCH))
        return total / max(count, 1)

    def kind(self, output: Any) -> str:
        """What its values are."""
        if self.loss is not None:
            return GIVEN
        return SQUARES if _logits(output) is None else DIVERGENCE


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a model was calibrated by, and batches to measure the loss on.

    batches: As they were given.
    reader: Tells what the model takes of them.
    unseen: They are not among those whose statistics changes are computed from.
    """

    objective: Objective
    batches: tuple[Any, ...]
    reader: BatchReader
    unseen: bool = False

    def read(self) -> Iterator[Batch]:
        """The batches, each on the model's device while it is used."""
        return map(self.reader.read, self.batches)

    def value(self, model: nn.Module, original: nn.Module) -> float:
        """See `Objective.value`."""
        return self.objective.value(model, self.read(), original)

    def told(self) -> str:
        """What changes are measured on, for people."""
        count, seen = len(self.batches), "held back from" if self.unseen else "of"
        return f"{count} batch{'es' * (count != 1)} {seen} the calibration data"

    def kind(self, model: nn.Module) -> str:
        """What its values are."""
        first = next(self.read())
        return self.objective.kind(
            forward_once(copy_without_hooks(model), first.call, given=A_BATCH)
        )


def _curvature_of(
    loss: Loss, output: Any, batch: Any, generator: torch.Generator
) -> list[Probe] | None:
    """Probes of a given loss; None where its second derivative by the outputs is zero, or none can be taken."""
    leaves: list[tuple[Tensor, Tensor]] = []

    def free(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        leaves.append((value, leaf))
        return leaf

    try:
        with torch.enable_grad():
            value = loss(replaced(output, free), batch)
            inner = [leaf for _, leaf in leaves]
            slopes = torch.autograd.grad(value, inner, create_graph=True, allow_unused=True)
            found = []
            for (tensor, leaf), slope in zip(leaves, slopes, strict=True):
                if slope is None or not slope.requires_grad or not tensor.requires_grad:
                    continue
                root = _root(leaf, slope, generator)
                if root is not None:
                    found.append(Probe(tensor, root))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None  # it has no second derivative, or does not take such outputs
    return found or None


def _root(y: Tensor, slope: Tensor, generator: torch.Generator) -> Tensor | None:
    """A random direction with the Hessian as its second moment; `slope`: the loss's derivative by `y`."""

    def times(z: Tensor) -> Tensor:
        made = torch.autograd.grad(slope, y, z, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(y) if made is None else made.detach()

    z = _signs(y, generator)
    product = times(z)
    size = product.square().sum()
    if not bool(size.isfinite()) or not bool(size > 0):
        return None
    plain = y.detach()
    for dim in dict.fromkeys((-1, 1 if y.ndim > 2 else -1)):
        if y.ndim < 2:
            break
        p = plain.softmax(dim)
        fit = p * (z - (p * z).sum(dim, keepdim=True))
        weight = (product * fit).sum(dim, keepdim=True)
        weight = weight / fit.square().sum(dim, keepdim=True).clamp(min=1e-30)
        if bool((product - weight * fit).square().sum() <= FITS * size):
            return _softmax_root(plain, weight.clamp(min=0), dim, generator)
    diagonal = z * product
    for _ in range(PROBES - 1):
        z = _signs(y, generator)
        diagonal = diagonal + z * times(z)
    return (diagonal / PROBES).clamp(min=0).sqrt() * _signs(y, generator)


def _softmax_root(y: Tensor, weight: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """A direction of second moment weight · (diag(p) − p pᵀ) in each row, as gradients by sampled targets have it."""
    p = y.softmax(dim)
    v = _signs(y, generator) * p.sqrt()
    return weight.sqrt() * (v - p * v.sum(dim, keepdim=True))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(like.device, like.dtype)


def _logits(output: Any) -> Tensor | None:
    """The outputs that are logits by name, or log-probabilities."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 1:
        return found
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
        sums = output.detach().logsumexp(-1)
        if output.shape[-1] > 1 and bool((sums.abs() < 1e-3).all()):
            return output
    return None


def _measured(output: Any) -> list[Tensor]:
    """The first floating tensor of more than one dimension, or else the first."""
    able = [t for t in tensors_in(output) if t.is_floating_point()]
    return next(([t] for t in able if t.ndim > 1), able[:1])


def _spread(y: Tensor) -> float:
    """Σ‖y − mean‖² over the rows, positive."""
    rows = y.double().flatten(0, -2) if y.ndim > 1 else y.double()[None]
    centred = rows - rows.mean(0) if len(rows) > 1 else rows
    return max(float(centred.square().sum()), 1e-300)


def _apart(output: Any, reference: Any) -> float:
    logits, known = _logits(output), _logits(reference)
    if logits is not None and known is not None:
        log_p, log_q = known.log_softmax(-1), logits.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    pairs = zip(_measured(output), _measured(reference), strict=True)
    return sum(float((a - b).double().square().sum()) / _spread(b) for a, b in pairs)

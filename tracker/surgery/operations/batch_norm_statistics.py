"""Running statistics of batch norms, taken anew from data: after a change the old ones describe another network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tracker.errors import SurgeryError
from tracker.inputs.batches import A_BATCH, Batch
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.surgery.undo import UndoLog, writable

Moments = dict[str, list[tuple[Tensor, Tensor]]]  # of each norm, batch by batch


def reestimate(model: nn.Module, batches: Iterable[Batch], log: UndoLog) -> list[str]:
    """Give each norm the mean and the variance, over all `batches`, of what it reads.

    Returns:
        The norms' names. How to take it back is noted in `log`.

    Raises:
        SurgeryError: No norm keeps running statistics, or none was reached by a batch.
        StructureError: A forward pass failed.
    """
    trial_copy = copy_without_hooks(model)
    norms = _running(trial_copy)
    if not norms:
        raise SurgeryError(
            "No norm of the model keeps running statistics: there is nothing to take anew."
        )
    seen: Moments = {}
    for batch in batches:
        forward_once(trial_copy, batch.call, within=_shown(norms, seen), given=A_BATCH)
    if not seen:
        raise SurgeryError("No batch reached a norm: pass batches as the model takes them.")
    new = {name: _whole(parts) for name, parts in seen.items()}
    own = _running(model)
    with writable():
        for name, moments in new.items():
            buffers = own[name].running_mean, own[name].running_var
            for buffer, value in zip(buffers, moments, strict=True):
                assert buffer is not None
                log.add(partial(buffer.copy_, buffer.clone()))
                buffer.copy_(value)
    return list(new)


def _running(model: nn.Module) -> dict[str, _NormBase]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


@contextmanager
def _shown(norms: dict[str, _NormBase], seen: Moments) -> Iterator[None]:
    """Inside, norms go by the batch; what they found in it is added to `seen`."""
    before = {name: int(norm.num_batches_tracked or 0) for name, norm in norms.items()}
    for norm in norms.values():
        norm.train()
        norm.momentum = 1.0
    yield
    for name, norm in norms.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if int(norm.num_batches_tracked or 0) > before[name]:
            found = norm.running_mean.double().clone(), norm.running_var.double().clone()
            seen.setdefault(name, []).append(found)


def _whole(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all batches together: the variance inside them, and between their means."""
    means, variances = (torch.stack(each) for each in zip(*parts, strict=True))
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)

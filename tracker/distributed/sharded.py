"""Models that `fully_shard` (FSDP2) spread over processes: gathered into a whole one, changed, and spread anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from tracker.errors import SurgeryError
from tracker.surgery.optimizer_state.slot_age import watch


def gather_sharded(
    sharded: nn.Module, optimizer: Optimizer, whole: nn.Module, whole_optimizer: Optimizer
) -> None:
    """Give a whole model and its optimizer the weights and the state of a sharded one. A collective of all ranks.

    `whole` is what `sharded` was made of, before it was spread: of the same architecture, on every rank, and it is
    this one that an engine tracks and changes. It takes the memory of all weights and of the optimizer's state.

    Args:
        sharded: The model of `fully_shard`.
        optimizer: Of the sharded model.
        whole: The model that the engine tracks.
        whole_optimizer: Of the whole model.

    Raises:
        SurgeryError: The two models are not of one architecture, or the optimizers not of one kind.

    Examples:
        >>> from tracker import gather_sharded, shard_anew
        >>> shard = torch.distributed.fsdp.fully_shard
        >>> sharded, own = shard_anew(model, optimizer, shard, torch.optim.Adam)  # doctest: +SKIP
        >>> gather_sharded(sharded, own, model, optimizer)  # doctest: +SKIP
        >>> receipt = engine.prune_neurons({"0": [1]})  # on all ranks; then shard_anew
    """
    _require_same_names(sharded, whole)
    _carry(sharded, optimizer, whole, whole_optimizer)


def shard_anew(
    whole: nn.Module,
    whole_optimizer: Optimizer,
    shard: Callable[[nn.Module], object],
    build_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> tuple[nn.Module, Optimizer]:
    """A sharded copy of a whole model, and an optimizer of it with the whole one's state. A collective of all ranks.

    Args:
        whole: Stays as it is, for the next change.
        whole_optimizer: Its optimizer, of the kind that `build_optimizer` makes.
        shard: Calls `fully_shard` on a model, in place, as before.
        build_optimizer: Takes the parameters of the sharded model. Learning rates and other options come from
            `whole_optimizer`; a scheduler is to be made anew.

    Raises:
        SurgeryError: The two optimizers are not of one kind, or have not as many parameter groups.

    Examples:
        >>> from tracker import shard_anew
        >>> shard = torch.distributed.fsdp.fully_shard
        >>> sharded, own = shard_anew(model, optimizer, shard, torch.optim.Adam)  # doctest: +SKIP
    """
    sharded = copy.deepcopy(whole)
    shard(sharded)
    optimizer = build_optimizer(sharded.parameters())
    _carry(whole, whole_optimizer, sharded, optimizer)
    watch(optimizer)  # new units go on correcting their steps by their own age
    return sharded, optimizer


def _carry(model: nn.Module, optimizer: Optimizer, other: nn.Module, others: Optimizer) -> None:
    """Weights, state and options of one model and its optimizer, given to another, whichever of them is sharded."""
    from torch.distributed.checkpoint import state_dict as torchs

    have, given = len(others.param_groups), len(optimizer.param_groups)
    if type(others) is not type(optimizer) or have != given:
        raise SurgeryError(
            f"The state of {type(optimizer).__name__} with {given} parameter groups cannot go to "
            f"{type(others).__name__} with {have}: build both alike."
        )
    options = torchs.StateDictOptions(full_state_dict=True)
    weights = torchs.get_model_state_dict(model, options=options)
    torchs.set_model_state_dict(other, weights, options=options)
    if optimizer.state:  # of an empty one torch would take a first step, and count it
        state = torchs.get_optimizer_state_dict(model, optimizer, options=options)
        torchs.set_optimizer_state_dict(other, others, state, options=options)
    else:
        others.state.clear()
        for mine, group in zip(optimizer.param_groups, others.param_groups, strict=True):
            group.update({name: value for name, value in mine.items() if name != "params"})


def _require_same_names(sharded: nn.Module, whole: nn.Module) -> None:
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (sharded, whole)]
    if shapes[0] != shapes[1]:
        pairs = set(shapes[0].items()) ^ set(shapes[1].items())
        name, shape = sorted(pairs)[0]
        raise SurgeryError(
            f"The sharded model and the whole one are not of one architecture: {name} {shape} is in one of them "
            "only. Gather into the model that was spread, before it is changed; then shard_anew."
        )

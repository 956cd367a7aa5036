"""What changes with a model: its optimizers, the copies that follow it, and its replicas in other processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracker.distributed.ranks import Ranks, WrapperFinder
from tracker.errors import SurgeryError
from tracker.parts.sessions import Sessions
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery.optimizer_state.attachments import follower_of, holds, torch_optimizer
from tracker.surgery.optimizer_state.slot_age import watch
from tracker.tracker import ActivationTracker


class Attachments:
    """Takes in, and lets go of, what must change with a model.

    Args:
        tracker: Holds the models.
        sessions: Where it is kept what belongs to each.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions) -> None:
        self._tracker = tracker
        self._sessions = sessions

    def attach_optimizer(self, *optimizers: Any) -> None:
        """Have the state of these optimizers move with every change of the tracked models whose parameters they hold.

        Args:
            optimizers: Built over parameters of tracked models.

        Raises:
            SurgeryError: One is no optimizer, or holds no parameter of a tracked model; none was attached.

        Examples:
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> engine.attach_optimizer(sgd)  # from here on its state changes with the model
        """
        sessions = self._sessions.living
        owners = []
        for optimizer in optimizers:
            plain = torch_optimizer(optimizer)
            mine = [s for s in sessions if holds(plain, s.models())]
            if not mine:
                names = ", ".join(repr(s.entry.name) for s in sessions) or "none"
                raise SurgeryError(
                    f"This {type(plain).__name__} holds no parameter of a tracked model ({names}): its state could not "
                    "move with a change. Call track_model(model) first, and build the optimizer over that model's "
                    "parameters."
                )
            owners.append(mine)
        for optimizer, mine in zip(optimizers, owners, strict=True):
            for session in mine:
                if not any(o is optimizer for o in session.optimizers):
                    session.optimizers.append(optimizer)
            watch(
                torch_optimizer(optimizer)
            )  # a state that is loaded may be that of a model that grew

    def detach_optimizer(self, *optimizers: Any) -> None:
        """Let go of these optimizers: changes leave their state as it is.

        Args:
            optimizers: Attached ones.

        Raises:
            SurgeryError: One is not attached; none was detached.

        Examples:
            >>> engine.detach_optimizer(optimizer)
        """
        sessions = list(self._sessions)
        for optimizer in optimizers:
            if not any(o is optimizer for s in sessions for o in s.optimizers):
                raise SurgeryError(f"This {type(optimizer).__name__} is not attached.")
        for session in sessions:
            session.optimizers = [
                o for o in session.optimizers if not any(o is gone for gone in optimizers)
            ]

    def attach_process_group(self, group: Any = None) -> None:
        """Change the current model's replicas on all ranks of a group (None: all processes) alike, or none of them.

        From here on every change, `calibrate` and `merge_statistics` are collectives: all ranks call them in the same
        order. The plan's numbers are the first rank's. After a change, a DistributedDataParallel wrapper is to be
        made anew: `model = tracker.renew(model)`.

        Args:
            group: Of torch.distributed; None: all processes.

        Raises:
            SurgeryError: torch.distributed is not initialised.
            VerificationError: The replicas, or the states of their attached optimizers, are not the same.

        Examples:
            >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
            >>> engine.attach_process_group()  # doctest: +SKIP
        """
        ranks, session = Ranks(group), self._sessions.current
        ranks.require_same_model(session.entry.model(), session.optimizers)
        session.ranks = ranks
        model = session.entry.model()
        if not any(isinstance(hook, WrapperFinder) for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(WrapperFinder(), prepend=True)

    def merge_statistics(self) -> None:
        """End the window, and give each rank the statistics of all; the next begins with `start_tracking`.

        Raises:
            SurgeryError: `attach_process_group` was not called.

        Examples:
            >>> engine.attach_process_group()  # doctest: +SKIP
            >>> engine.merge_statistics()  # doctest: +SKIP
        """
        session = self._sessions.current
        if session.ranks is None:
            raise SurgeryError("There are no ranks to merge: call attach_process_group first.")
        observer = session.entry.observer
        self._tracker.stop()
        if session.merged != observer.version:
            session.ranks.merge_windows(observer)
            session.merged = observer.version

    def attach_follower(self, *models: nn.Module) -> None:
        """Have these copies of the current model (an EMA, say) change alike.

        Args:
            models: Copies, with the same names of layers.

        Raises:
            SurgeryError: One is no copy of the current model; none was attached.

        Examples:
            >>> from torch.optim.swa_utils import AveragedModel
            >>> average = AveragedModel(model)
            >>> engine.attach_follower(average)
            >>> receipt = engine.prune_neurons({"0": [1]})
            >>> average.module[0].out_features
            7
        """
        session = self._sessions.current
        for follower in models:
            follower_of(session.entry.model(), follower)
        session.followers += [m for m in models if not any(m is f for f in session.followers)]

    def detach_follower(self, *models: nn.Module) -> None:
        """Let go of these copies of the current model: changes leave them as they are.

        Args:
            models: Attached ones.

        Raises:
            SurgeryError: One does not follow it; none was detached.

        Examples:
            >>> from copy import deepcopy
            >>> teacher = deepcopy(model)
            >>> engine.attach_follower(teacher)
            >>> engine.detach_follower(teacher)
        """
        session = self._sessions.current
        for model in models:
            if not any(model is f for f in session.followers):
                raise SurgeryError(
                    f"This {type(model).__name__} does not follow {session.entry.name!r}."
                )
        session.followers = [f for f in session.followers if not any(f is m for m in models)]

    def rewind(self, follower: nn.Module, *, reset_optimizers: bool = True) -> None:
        """Give the current model the weights and buffers of a follower: of an earlier step, if none moved it since.

        A copy that follows the model (`attach_follower`) changes alike, so that it has the weights of the step at which
        it was made in the architecture of now: what lottery tickets are rewound to (Frankle et al., 2020). Where the
        others took over what went, they did so in the copy as well; new units are as they came. The last change can be
        no longer undone, and awaits no verdict.

        Args:
            follower: An attached one.
            reset_optimizers: Whether optimizers forget what they know of these parameters.

        Raises:
            SurgeryError: It does not follow the current model; nothing was touched.

        Examples:
            >>> from copy import deepcopy
            >>> early = deepcopy(model)
            >>> engine.attach_follower(early)
            >>> receipt = engine.prune_neurons({"0": [1]})  # in the copy, too
            >>> engine.rewind(early)
            >>> torch.equal(model(x), early(x))
            True
        """
        session = self._sessions.current
        if not any(follower is f for f in session.followers):
            raise SurgeryError(
                f"This {type(follower).__name__} does not follow {session.entry.name!r}: attach a copy with "
                "attach_follower at the step to which you want to return."
            )
        model = session.entry.model()
        early = tensors(follower_of(model, follower))
        held = tensors(model)
        if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in early.items()}:
            raise SurgeryError(
                f"This {type(follower).__name__} has other buffers than {session.entry.name!r}: it is no copy of it."
            )
        session.last = None
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(early[name])
        for optimizer in session.attached()[0] if reset_optimizers else ():
            state = torch_optimizer(optimizer).state
            for parameter in model.parameters():
                state.pop(parameter, None)
        session.changed()

"""A callback for Hugging Face's Trainer: the model is watched, and changes itself while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from tracker.engine import NeuronEngine
from tracker.errors import SurgeryError
from tracker.observation.compiled import is_new_data
from tracker.training.schedule import steps_for


class SelfModificationCallback(TrainerCallback):
    """Tracks the model, hands the engine its optimizer, and takes a step of self-modification after each of its.

    The Trainer does not tell callbacks the loss; it is read off the model's own output. Its checkpoints carry all that
    is needed to go on: `Trainer.train(resume_from_checkpoint=True)`, with a model at its original sizes, changes it as
    its journal says, and the run goes on with its policy, its timeline, and the change that awaits its verdict.

    Args:
        policy: What `start_self_modification` takes. None: that of the checkpoint, else the default one, fitted to
            the steps that the Trainer takes.
        engine: To use; else `callback.engine` is a new one.
    """

    def __init__(self, policy: Any = None, engine: NeuronEngine | None = None) -> None:
        self.policy, self.engine = policy, engine or NeuronEngine()
        self._losses: list[torch.Tensor] = []
        self._handle: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's call, before it loads a checkpoint into the model.

        Raises:
            SurgeryError: Several processes train: the Trainer keeps the wrapper that would have to be renewed.
        """
        if args.world_size > 1:
            raise SurgeryError(
                f"The Trainer runs in {args.world_size} processes and keeps its wrapper, which a change makes stale. "
                "Use one process, Lightning, or a loop of your own with attach_process_group and renew."
            )
        if kwargs.get("model") is not None:  # else it is made when training begins
            self._track(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's call, once there is an optimizer, with its state."""
        model = kwargs["model"]
        self._track(model)
        self.engine.attach_optimizer(kwargs["optimizer"])
        self.engine.start_self_modification(
            self.policy, steps=steps_for(self.policy, state.max_steps)
        )
        self._handle = model.register_forward_hook(_seen_by(self._losses))

    def _track(self, model: nn.Module) -> None:
        self.engine.track_model(model, type(model).__name__)
        self.engine.carry_journal(run=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's call, after the optimizer's step."""
        losses = [*self._losses]
        self._losses.clear()
        if losses:
            self.engine.step(torch.stack(losses).mean())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's call."""
        self.engine.stop_self_modification()
        if self._handle is not None:
            self._handle.remove()


def _seen_by(losses: list[torch.Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def see(module: nn.Module, args: Any, output: Any) -> None:
        if not is_new_data():
            return  # the model is only tried
        loss = output.get("loss") if isinstance(output, dict) else None
        if module.training and loss is not None:
            losses.append(loss.detach().float())

    return see

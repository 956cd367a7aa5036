"""A Lightning callback: the module is watched, and changes itself while `Trainer.fit` runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tracker.engine import NeuronEngine
from tracker.errors import SurgeryError
from tracker.integrations.loggers import log_to
from tracker.training import Phases, Policy


class SelfModificationCallback(Callback):
    """Tracks the module, hands the engine its optimizers, and takes a step of self-modification after theirs.

    Args:
        policy: None for the default one.
        engine: To use; else `callback.engine` is a new one.
    """

    def __init__(
        self, policy: Policy | Phases | None = None, engine: NeuronEngine | None = None
    ) -> None:
        self.policy, self.engine = policy, engine or NeuronEngine()
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's call, once optimizers are there.

        Raises:
            SurgeryError: Several processes train: Lightning keeps the wrapper that would have to be renewed.
        """
        if trainer.world_size > 1:
            raise SurgeryError(
                f"Lightning trains in {trainer.world_size} processes and keeps its wrapper, which a change makes "
                "stale. Use one process, or a loop of your own with attach_process_group and renew."
            )
        self.engine.track_model(pl_module, type(pl_module).__name__)
        self.engine.attach_optimizer(*trainer.optimizers)
        self.engine.start_self_modification(self.policy)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Lightning's call; with gradient accumulation not each batch is a step."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self.engine.step(loss) is not None and trainer.logger is not None:
            log_to(trainer.logger, self.engine, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's call."""
        self.engine.stop_self_modification()

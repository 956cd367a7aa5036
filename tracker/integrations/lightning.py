"""A Lightning callback: the module is watched, and changes itself while `Trainer.fit` runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tracker.checkpoint.random_states import gather_noise, rng_restorer
from tracker.distributed.ranks import renew
from tracker.engine import NeuronEngine
from tracker.errors import SurgeryError
from tracker.integrations.loggers import log_to
from tracker.journal.state_dict_hooks import InertCallable
from tracker.training.schedule import steps_for

INSTANTIATOR = f"{__name__}.instantiate"
_KEEPER = "_tracker_engine"  # under which a module that was loaded keeps its engine


def instantiate(kind: type[LightningModule], arguments: dict[str, Any]) -> LightningModule:
    """Build a module whose `load_state_dict` replays a journal: `load_from_checkpoint` calls it.

    Args:
        kind: Class of the module.
        arguments: Of its constructor.
    """
    module = kind(**arguments)
    engine = NeuronEngine()
    engine.track_model(_watched(module), kind.__name__)
    engine.carry_journal(run=True)
    vars(module)[_KEEPER] = _Keeper(engine)
    return module


# Lightning calls only such functions as are listed here.
_ALLOWED: set[str] = getattr(saving, "_ALLOWED_INSTANTIATORS", set())
_ALLOWED.add(INSTANTIATOR)


class _Keeper:
    """Holds the engine of a module that was loaded; copies and files of the module do without."""

    __slots__ = ("engine",)

    def __init__(self, engine: NeuronEngine | None = None) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: object) -> _Keeper:
        return _Keeper()

    def __reduce__(self) -> tuple[type[_Keeper], tuple[()]]:
        return _Keeper, ()


class SelfModificationCallback(Callback):
    """Tracks the module, hands the engine its optimizers, and takes a step of self-modification after theirs.

    Checkpoints of Lightning carry all that is needed to go on: `Trainer.fit(ckpt_path=...)` and
    `load_from_checkpoint` build the module at its original sizes and change it as its journal says, and the run goes
    on with its policy, its timeline, and the change that awaits its verdict. In one process the states of the random
    generators go on, too.

    With DistributedDataParallel each rank needs this callback; its wrapper is made anew after each change.

    Args:
        policy: What `start_self_modification` takes. None: that of the checkpoint, else the default one, fitted to
            the steps that the Trainer takes.
        engine: To use; else `callback.engine` is a new one.
    """

    def __init__(self, policy: Any = None, engine: NeuronEngine | None = None) -> None:
        self.policy, self.engine = policy, engine or NeuronEngine()
        self._given = engine is not None
        self._steps = 0
        self._inside = False  # an epoch, between two of its batches
        self._noise: dict[str, Any] | None = None  # of the checkpoint that is resumed from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's call, before it loads a checkpoint into the module.

        Raises:
            SurgeryError: The module, or the way in which it is trained, cannot be watched.
        """
        kept = vars(pl_module).get(_KEEPER)
        if kept is not None and kept.engine is not None and not self._given:
            self.engine = kept.engine
        if stage == "fit":
            _require_trainable(trainer, pl_module)
        watched, example = _watched(pl_module), pl_module.example_input_array
        self.engine.track_model(watched, type(pl_module).__name__)
        self.engine.carry_journal(run=True)
        observer = self.engine.tracker.current.observer
        if isinstance(example, torch.Tensor | tuple | dict) and watched is pl_module:
            if not observer.calls:
                self.engine.track_model(watched, example_inputs=example)
        elif trainer.world_size > 1 and watched is pl_module and not observer.calls:
            # The wrapper calls the module with the batch, in the place of its inputs.
            self.engine.tracker.current.detach()
            _InputHook(self.engine, watched)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: states of the random generators. The rest is the module's."""
        tensors, facts = gather_noise()
        return {"tensors": tensors, "facts": facts, "inside": self._inside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._noise = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning's call: `load_from_checkpoint` is told how to build the module."""
        arguments = checkpoint.setdefault(pl_module.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if isinstance(arguments, dict):
            arguments.setdefault("_instantiator", INSTANTIATOR)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's call, before it makes the iterators over data, which draw random numbers."""
        self._go_on_drawing(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's call, once optimizers are there, with their states."""
        self.engine.track_model(_watched(pl_module))
        self.engine.attach_optimizer(*trainer.optimizers)
        if trainer.world_size > 1:
            self.engine.attach_process_group()
        steps = steps_for(self.policy, trainer.estimated_stepping_batches)
        self.engine.start_self_modification(self.policy, steps=steps)
        self._steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's call."""
        if self._noise is not None:
            if self._noise[
                "inside"
            ]:  # the iterator has drawn once more than it had without the break
                self._go_on_drawing(trainer)
            self._noise = None
        self._inside = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Lightning's call; with gradient accumulation not each batch is a step.

        Raises:
            SurgeryError: The training step does not call the module itself, so that nothing can be watched.
        """
        self._inside = not trainer.is_last_batch
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if not self.engine.tracker.current.observer.calls:
            raise SurgeryError(
                f"The training step of {type(pl_module).__name__} does not call the module itself, self(x): how the "
                "model is called cannot be seen. Call self(x) in it, or set self.example_input_array to an input of "
                "forward."
            )
        receipt = self.engine.step(loss)
        if receipt is None:
            return
        _renew(trainer)
        if trainer.logger is not None:
            log_to(trainer.logger, self.engine, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's call."""
        self.engine.stop_self_modification()

    def _go_on_drawing(self, trainer: Trainer) -> None:
        if self._noise is not None and trainer.world_size == 1:
            rng_restorer(self._noise["tensors"], self._noise["facts"])()


class _InputHook:
    """Keeps what the module's own forward takes as example inputs, once."""

    def __init__(self, engine: NeuronEngine, module: nn.Module) -> None:
        self._engine = engine
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __deepcopy__(self, memo: object) -> InertCallable:
        return InertCallable()

    def __reduce__(self) -> tuple[type[InertCallable], tuple[()]]:
        return InertCallable, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            return  # the wrapper's way to the training step
        self._handle.remove()
        observer = self._engine.tracker.tracked(module).observer
        observer.inputs = args, dict(kwargs)
        observer.shown()


def _watched(module: LightningModule) -> nn.Module:
    """What is tracked: the module, or where it has no forward of its own, the one network in it.

    Raises:
        SurgeryError: There are several.
    """
    if is_overridden("forward", module, LightningModule):
        return module
    parts = {
        name: part
        for name, part in module.named_children()
        if next(part.parameters(), None) is not None
    }
    if len(parts) == 1:
        return next(iter(parts.values()))
    raise SurgeryError(
        f"{type(module).__name__} has no forward, and {len(parts)} networks ({', '.join(parts) or 'none'}): which one "
        "is called how, nobody can tell. Give it a forward, and call self(x) in training_step."
    )


def _require_trainable(trainer: Trainer, module: LightningModule) -> None:
    """Refuse, before the first step, ways of training in which nothing could be changed.

    Raises:
        SurgeryError: It is one of them.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        raise SurgeryError(
            f"This {type(module).__name__} was compiled as a whole: its compiled forward is bound to it, and runs it "
            "also where a change is tried on a copy. Compile the network in it instead, by self.net.compile() in "
            "__init__ or in configure_model."
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise SurgeryError(
            f"Lightning trains in {trainer.world_size} processes with {type(trainer.strategy).__name__}: only DDP can "
            "be changed while it trains. Use strategy='ddp' or one process."
        )


def _renew(trainer: Trainer) -> None:
    """Wrap the changed module anew."""
    strategy: Any = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = renew(strategy.model)

"""The sessions of an engine: one for each model that it tracks, made when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tracker.analysis.epoch_history import TrainingHistory
from tracker.distributed.ranks import watch_wrapper
from tracker.parts.session import Session, rehearsing
from tracker.surgery.optimizer_state.attachments import holds, torch_optimizer
from tracker.tracker import ActivationTracker, TrackedModel


class Sessions:
    """What an engine keeps of each of its models.

    Args:
        tracker: Whose models they are.
        activation_threshold: Of a history that begins.
    """

    def __init__(self, tracker: ActivationTracker, activation_threshold: float) -> None:
        self._tracker = tracker
        self._threshold = activation_threshold
        self._kept: dict[TrackedModel, Session] = {}
        self._loaded: TrainingHistory | None = None  # before the first model was tracked

    def __iter__(self) -> Iterator[Session]:
        """Those that were asked for, in that order."""
        return iter(list(self._kept.values()))

    @property
    def current(self) -> Session:
        """All that belongs to the current model.

        Raises:
            NotTrackedError: No model is tracked.
        """
        return self.of(self._tracker.current)

    @property
    def present(self) -> Session | None:
        """The current model's session; None where no model is tracked."""
        return self.current if self._tracker.models else None

    def of(self, entry: TrackedModel) -> Session:
        """The session of one tracked model."""
        if entry not in self._kept:
            history = self._loaded or TrainingHistory(self._threshold)
            self._kept[entry], self._loaded = Session(self._tracker, entry, history), None
        return self._kept[entry]

    @property
    def living(self) -> list[Session]:
        """Those of all models that are tracked and still exist."""
        return [self.of(entry) for entry in self._tracker.living()]

    @property
    def history(self) -> TrainingHistory:
        """The logged epochs of the current model (or what was loaded, without one)."""
        if self._tracker.models:
            return self.current.history
        self._loaded = self._loaded or TrainingHistory(self._threshold)
        return self._loaded

    @history.setter
    def history(self, history: TrainingHistory) -> None:
        if self._tracker.models:
            self.current.history = history
        else:
            self._loaded = history

    def meet(self, model: nn.Module) -> None:
        """Know a model that was just tracked, as the user holds it: its wrapper, and optimizers that hold it too."""
        session = self.current
        watch_wrapper(model)
        for optimizer in [o for other in self for o in other.optimizers]:
            mine = any(o is optimizer for o in session.optimizers)
            if not mine and holds(torch_optimizer(optimizer), session.models()):
                session.optimizers.append(optimizer)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, the current model is a copy of what it is now, with a state of its own: for what is only tried."""
        session = self.current
        with rehearsing(self._tracker) as entry:
            self._kept[entry] = Session(
                self._tracker,
                entry,
                session.history,
                ranks=session.ranks,
                calibration=session.calibration,
                tried=True,
            )
            try:
                yield
            finally:
                del self._kept[entry]

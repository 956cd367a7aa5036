"""All that an engine keeps of one model: history, journal, what changes with it, and how a change is taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tracker.distributed import Ranks
from tracker.history import TrainingHistory
from tracker.journal import Journal
from tracker.structure.lending import borrowed
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.attachments import follower_of
from tracker.surgery.objective import Calibration
from tracker.tracker import ActivationTracker, TrackedModel


class Transaction:
    """Steps that stay or go together: how to take them back, and the receipt of what they did."""

    def __init__(self) -> None:
        self.log = UndoLog()
        self.receipt: Receipt | None = None


@dataclass(eq=False)
class Session:
    """The state of one tracked model. Nothing of it is shared with other models of the engine."""

    entry: TrackedModel
    history: TrainingHistory
    journal: Journal = field(default_factory=Journal)
    optimizers: list[Any] = field(default_factory=list)
    followers: list[nn.Module] = field(default_factory=list)
    last: Transaction | None = None  # the last change, as long as it can be taken back
    ranks: Ranks | None = None
    merged: int | None = None  # version of the window that all ranks share
    calibration: Calibration | None = None
    run: Any = None  # the last one that was started
    clock: Callable[[], int] | None = None  # steps of the run, for the journal
    carried: bool = False  # its state_dict carries the journal
    tried: bool = False  # of a copy, on which a change is only tried
    _open: Transaction | None = None

    def models(self) -> list[nn.Module]:
        """The model, and the copies that follow it."""
        model = self.entry.model()
        return [model, *(follower_of(model, f) for f in self.followers)]

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes inside are one: all stay, or none, and they are undone together. One inside another is part of it."""
        outer, inner = self._open, Transaction()
        self._open = inner
        try:
            yield inner
        except BaseException:
            inner.log.undo()
            raise
        finally:
            self._open = outer
        if inner.receipt is None or inner.receipt.dry_run:
            return
        if outer is None:
            self.last = inner
        else:
            outer.log.add(inner.log.undo)


@contextmanager
def rehearsing(tracker: ActivationTracker) -> Iterator[TrackedModel]:
    """Inside, the current model is a copy of it, with ids and statistics of its own: nothing of it stays."""
    entry, registry = tracker.current, tracker.registry
    with borrowed(entry.model()) as bench:
        tracker.registry, layers = copy.deepcopy((registry, entry.layers))
        tried = replace(
            entry,
            observer=entry.observer.copied(bench),
            layers=layers,
            handles=[],
            hooked=False,
        )
        try:
            with tracker.speaking_of(tried):
                yield tried
        finally:
            tracker.registry = registry

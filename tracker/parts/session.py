"""All that an engine keeps of one model: history, journal, what changes with it, and how a change is taken back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tracker.analysis.epoch_history import TrainingHistory
from tracker.distributed.ranks import Ranks
from tracker.journal import Entry, Journal, Origin, When
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.calibration.loss import Calibration
from tracker.surgery.optimizer_state.attachments import follower_of
from tracker.surgery.plan import Plan
from tracker.tracker import ActivationTracker, TrackedModel

_LAST = "_tracker_last_change"  # name under which a model keeps its last change
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()  # of all engines


class Transaction:
    """Steps that stay or go together: how to take them back, and the receipt of what they did.

    The model keeps its last one, so that the two end together, and engines that share a model agree on what is last.
    It does not follow the model into a copy or a file.
    """

    __slots__ = (
        "__weakref__",
        "log",
        "receipt",
    )  # no dictionary: it is no configuration of the model

    def __init__(self) -> None:
        self.log = UndoLog()
        self.receipt: Receipt | None = None

    def __deepcopy__(self, memo: object) -> Transaction:
        return Transaction()

    def __reduce__(self) -> tuple[type[Transaction], tuple[()]]:
        return Transaction, ()


@dataclass(eq=False)
class Session:
    """What one engine keeps of one model. Nothing of it is shared with other models of the engine."""

    tracker: ActivationTracker
    entry: TrackedModel
    history: TrainingHistory
    journal: Journal = field(default_factory=Journal)
    origin: Origin = field(default_factory=Origin)  # what the model was before its journal
    optimizers: list[Any] = field(default_factory=list)
    followers: list[nn.Module] = field(default_factory=list)
    ranks: Ranks | None = None
    merged: int | None = None  # version of the window that all ranks share
    calibration: Calibration | None = None
    run: Any = None  # the last one that was started
    clock: Callable[[], int] | None = None  # steps of the run, for the journal
    carried: bool = False  # its state_dict carries the journal
    carries_run: bool = False  # and the run
    waiting: Any = None  # a run that came with a state dict, and goes on when one is started
    tried: bool = False  # of a copy, on which a change is only tried
    replaced: bool = False  # the model became that of a checkpoint, which another engine knows
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the parameters, as last known
    _open: Transaction | None = None

    def __post_init__(self) -> None:
        """Know the model as it is, and be known to other engines that share it."""
        self.shapes = self._found()
        if not self.tried:
            _sessions.add(self)

    @property
    def last(self) -> Transaction | None:
        """The model's last change, whichever engine made it, as long as it can be taken back."""
        model = self.entry.observer.model()
        found: Transaction | None = None if model is None else vars(model).get(_LAST)
        return None if found is None or found.receipt is None else found

    @last.setter
    def last(self, change: Transaction | None) -> None:
        table = vars(self.entry.model())
        table.pop(_LAST, None)
        if change is not None:
            table[_LAST] = change

    def ids(self) -> set[int]:
        """Ids of all neurons that the model has."""
        return {i for layer in self.entry.layers.values() for i in layer.ids}

    def models(self) -> list[nn.Module]:
        """The model, and the copies that follow it."""
        model = self.entry.model()
        return [model, *(follower_of(model, f) for f in self.followers)]

    def changed(self) -> None:
        """Tell runs that observe the model: what it saw so far is of another network."""
        for session in (self, *self.others()):
            if session.run is not None:
                session.run.interrupt()

    def others(self) -> list[Session]:
        """What other engines keep of the same model."""
        model = self.entry.observer.model()
        return [] if model is None else [s for s in sessions_of(model) if s is not self]

    def attached(self) -> tuple[list[Any], list[nn.Module]]:
        """Optimizers and followers that were attached to the model, by whichever engine."""
        mine = [] if self.tried else self.others()
        optimizers = [*self.optimizers, *(o for s in mine for o in s.optimizers)]
        followers = [*self.followers, *(f for s in mine for f in s.followers)]
        return list({id(o): o for o in optimizers}.values()), list(
            {id(f): f for f in followers}.values()
        )

    def changed_by_others(self) -> str:
        """How the model is not what this engine knows, or ""."""
        if self.replaced:
            return "a checkpoint was loaded into it, by another engine"
        found = self._found()
        for name, shape in self.shapes.items():
            if found.get(name, shape) != shape:
                return f"{name} was {tuple(shape)} and is {tuple(found[name])}"
        modules = dict(self.entry.model().named_modules())
        gone = [name for name in self.entry.layers if name not in modules]
        return f"the layer {gone[0]!r} is gone" if gone else ""

    def replace(self) -> None:
        """Know the model no more: another engine made it that of a checkpoint."""
        self.replaced = True
        self.entry.detach()
        self.optimizers, self.followers = [], []
        if self.run is not None:
            self.run.stop()

    def know(self, log: UndoLog) -> None:
        """Know the model's shapes as they are now, and those of before once `log` is undone."""
        before, now = self.shapes, self._found()
        log.add(lambda: setattr(self, "shapes", before))  # first: an interrupt may come in between
        self.shapes = now

    def _found(self) -> dict[str, torch.Size]:
        return {
            name: p.shape
            for name, p in self.entry.model().named_parameters(remove_duplicate=False)
            if not is_lazy(p)
        }

    def note(
        self, plan: Plan, receipt: Receipt, fingerprints: tuple[str, str], log: UndoLog
    ) -> None:
        """Write a change into the journal."""
        journal, epochs = self.journal, self.history.epochs
        step = self.clock() if self.clock is not None else None
        when = When(len(journal) + 1, step, epochs[-1].epoch if epochs else None)
        entry = Entry.of(plan, receipt, fingerprints, when)
        log.add(lambda: journal.take_back(entry))
        journal.add(entry)

    def take_in(
        self, plan: Plan, receipt: Receipt, fingerprints: tuple[str, str], log: UndoLog
    ) -> None:
        """Move ids and statistics by a change that another engine made, and write it into the journal.

        Where its layers are not those that this engine knows, it is left for this engine's next call to refuse.
        """
        layers = self.entry.layers
        slots = {name: moved for name, moved in plan.layers.items() if name in layers}
        if any(max(m.known, default=-1) >= len(layers[n].ids) for n, m in slots.items()):
            return
        removed = [
            i
            for name, moved in slots.items()
            for i in {*layers[name].ids} - {layers[name].ids[k] for k in moved.known}
        ]
        why = f"removed by {plan.operation} of another engine"
        with self.tracker.speaking_of(self.entry):
            added = self.tracker.remap(slots, plan.tensors, why, log.add)
            if plan.modules:
                log.add_last(self.tracker.rehook())
                born, gone = self.tracker.sync_layers(why, log.add)
                added, removed = [*added, *born], [*removed, *gone]
        self.know(log)
        own = replace(receipt, added_ids=added, removed_ids=sorted(removed))
        self.note(plan, own, fingerprints, log)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes inside are one: all stay, or none, and they are undone together. One inside another is part of it."""
        outer, inner, last = self._open, Transaction(), self.last
        self._open = inner
        if outer is None:
            self.last = None  # what is noted to undo this one must not keep the one before
        try:
            yield inner
            kept = inner.receipt is not None and not inner.receipt.dry_run
            if kept and outer is not None:
                outer.log.include(inner.log)
            elif kept:
                self.changed()
                self.last = inner
            elif outer is None:
                self.last = last
            self._open = outer  # the last line: from here on it is done
        except BaseException:
            inner.log.undo()
            self._open = outer
            if outer is None:
                self.last = last
            raise


def sessions_of(model: nn.Module) -> list[Session]:
    """What all engines keep of a model.

    Args:
        model: Not wrapped.
    """
    return [s for s in list(_sessions) if s.entry.observer.model() is model]


@contextmanager
def rehearsing(tracker: ActivationTracker) -> Iterator[TrackedModel]:
    """Inside, the current model is a copy of it, with ids and statistics of its own: nothing of it stays."""
    entry, registry = tracker.current, tracker.registry
    with temporary_copy(entry.model()) as trial_copy:
        tracker.registry, layers = copy.deepcopy((registry, entry.layers))
        tried = replace(
            entry,
            observer=entry.observer.copied(trial_copy),
            layers=layers,
            handles=[],
            hooked=False,
        )
        try:
            with tracker.speaking_of(tried):
                yield tried
        finally:
            tracker.registry = registry

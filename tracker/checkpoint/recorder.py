"""The part of an engine that remembers: history, journal and checkpoints."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from tracker.analysis.epoch_history import TrainingHistory
from tracker.analyzer import Analyzer
from tracker.checkpoint import run_state
from tracker.checkpoint.carried_journal import CarriedSession, restore_layers
from tracker.checkpoint.carried_run import MOST_IDS, unpack_run
from tracker.checkpoint.checkpoint_files import read_checkpoint, write_checkpoint
from tracker.checkpoint.optimizer_states import check_ownership, load_optimizers
from tracker.checkpoint.random_states import rng_restorer, rng_snapshot
from tracker.errors import CheckpointError, StatisticsError
from tracker.journal import (
    Entry,
    Journal,
    Origin,
    load_architecture,
    meta_model_after,
    moved_buffers,
    places,
)
from tracker.journal.state_dict_hooks import Found, carry
from tracker.modules.layers import find_layers, unwrap
from tracker.parts.attachments import Attachments
from tracker.parts.session import Session, Transaction, sessions_of
from tracker.parts.sessions import Sessions
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery import UndoLog
from tracker.surgery.optimizer_state.moments import unwrapped
from tracker.surgery.optimizer_state.slot_age import watch
from tracker.surgery.undo import rewrite
from tracker.tracker import ActivationTracker
from tracker.training import Policy, SelfModification, as_policy
from tracker.training.trainer import Trainer

PathLike = str | os.PathLike[str]
MOST_NEW = 2**16  # new neurons that a layer may get at once, beside 64 times those that it has


class Recorder:
    """Logs epochs, carries journals, and saves the whole of a run.

    Args:
        tracker: Holds models, ids and statistics.
        sessions: History, journal and run of each model.
        analyzer: Tells whether anything was observed in an epoch.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions, analyzer: Analyzer) -> None:
        self._tracker = tracker
        self._sessions = sessions
        self._analyzer = analyzer

    def log_epoch_statistics(
        self, epoch: int, train_loss: float | None = None, train_acc: float | None = None
    ) -> None:
        """Remember the current window, and the epoch's loss and accuracy, in the history.

        Args:
            epoch: Its number.
            train_loss: Of the epoch; None: not told.
            train_acc: Accuracy of the epoch; None: not told.

        Raises:
            StatisticsError: Nothing was observed since `start_tracking`.

        Examples:
            >>> engine.log_epoch_statistics(0, train_loss=1.1, train_acc=0.4)
            >>> engine.history.epochs[0].epoch
            0
        """
        observation, findings = self._analyzer.findings()
        if not any(found.observed.any() for found in findings.values()):
            raise StatisticsError(
                f"Epoch {epoch!r} cannot be logged: no activation was observed since start_tracking. Call "
                "start_tracking() before the epoch's forward passes."
            )
        self._sessions.history.log(observation, epoch, train_loss, train_acc)
        run = self._run
        if train_acc is not None and run is not None:
            run.accuracies.append((run.steps, float(train_acc)))

    def save_training_history(self, path: PathLike) -> Path:
        """Write the history as JSON.

        Args:
            path: Where to write; what is there is replaced once the new file is whole.

        Examples:
            >>> engine.log_epoch_statistics(0, train_loss=1.1)
            >>> engine.save_training_history("history.json").name
            'history.json'
        """
        return self._sessions.history.save(path)

    def load_training_history(self, path: PathLike) -> TrainingHistory:
        """Read a history back in place of the current one; a file that is none changes nothing.

        Args:
            path: Of a file that `save_training_history` wrote.

        Raises:
            StatisticsError: The file is missing, broken, or foreign.

        Examples:
            >>> engine.log_epoch_statistics(0, train_loss=1.1)
            >>> history = engine.load_training_history(engine.save_training_history("history.json"))
            >>> len(history.epochs)
            1
        """
        loaded = TrainingHistory.load(path)
        self._sessions.history = loaded
        return loaded

    def get_neuron_evolution(self, neuron_id: int) -> dict[str, list[Any]]:
        """Lists over the logged epochs: `epochs`, `mean`, `variance`, `frequency`, `loss`, `accuracy`.

        Args:
            neuron_id: Of a neuron that was logged.

        Examples:
            >>> engine.log_epoch_statistics(0, train_loss=1.1)
            >>> engine.get_neuron_evolution(3)["loss"]
            [1.1]
        """
        return self._sessions.history.evolution(neuron_id)

    def carry_journal(self, *, run: bool = False) -> None:
        """Have the current model's `state_dict` carry its journal, and `load_state_dict` replay one.

        Call it after `track_model`, before the load. Then checkpoints of other frameworks load into freshly built
        models, and earlier ones into a model that changed since: architecture, weights and ids. Optimizer state is
        loaded by the framework, after the model's.

        Args:
            run: Carry the run of `start_self_modification` too. After a load, the next call of
                `start_self_modification` goes on with it: step, timeline, what a look saw, and the change that awaits
                its verdict.

        Examples:
            >>> engine.carry_journal()
            >>> receipt = engine.prune_neurons({"0": [1]})
            >>> state = model.state_dict()  # holds the journal: a freshly built, tracked model loads it
            >>> receipt = engine.prune_neurons({"0": [2, 3]})
            >>> model.load_state_dict(state)  # and so does this one, back to what it was
            <All keys matched successfully>
            >>> model[0].out_features
            7
        """
        session = self._sessions.current
        session.carries_run = session.carries_run or run
        if not session.carried:
            session.carried = True
            carry(session.entry.model(), CarriedSession(self, session))

    def replay(self, model: nn.Module, found: Found) -> None:
        """Do changes of a journal again, on the model and in what the tracker knows of it; all or nothing.

        Args:
            model: A tracked one.
            found: The changes, and what came with them. A run waits for `start_self_modification`.

        Raises:
            CheckpointError: They do not fit what is tracked.
        """
        tracker, entries = self._tracker, found.entries
        session = self._sessions.of(tracker.tracked(model))
        _require_no_followers(session, found)
        plain = unwrapped(session.attached()[0])
        carried = None if found.run is None else unpack_run(found.run)
        known = [] if found.back else session.journal.entries
        here = len(known) + len(entries)
        first = here if carried is None or carried.entries is None else carried.entries
        first = max(min(first, here) - len(known), 0)
        change = Transaction()  # which awaits its verdict
        with tracker.speaking_of(session.entry):
            with _all_or_nothing("of the state dict") as log:
                log.add(tracker.registry.snapshot())
                if found.back:
                    self._restore_origin(session, log, plain)
                session.origin.note_all(model, entries, tracker.current.layers, plain)
                self._redo(model, entries[:first], log, plain)
                session.know(log)
                log.add(change.log.undo)
                self._redo(model, entries[first:], change.log, plain)
                for name, tensor in tensors(model).items():
                    if name in found.buffers:
                        rewrite(tensor, found.buffers[name].to(tensor.device), None, log)
                session.know(change.log)
                widths = {n: len(layer.ids) for n, layer in tracker.current.layers.items()}
                for layer in find_layers(model):
                    if layer.neurons is not None and widths.get(layer.name) != layer.neurons:
                        raise CheckpointError(
                            f"The journal gives {layer.name} {layer.neurons} neurons and "
                            f"{widths.get(layer.name, 'no')} ids."
                        )
            others = _changed_since(session.journal.entries, found) if found.back else ()
            _forget_states(model, plain, others)
            journal = session.journal
            journal.entries[:] = [*known, *entries]
            session.last = None
            if carried is not None and entries[first:]:
                for entry in reversed(entries[first:]):
                    change.log.add_last(partial(journal.take_back, entry))
                change.receipt, session.last = carried.receipt, change
            if carried is not None and (session.run is None or session.run.stopped):
                session.waiting = carried
        session.changed()

    def _restore_origin(
        self, session: Session, log: UndoLog, optimizers: Sequence[Optimizer]
    ) -> None:
        """Have the model be what it was before its journal began; what had other shapes has no values."""
        model = session.entry.model()
        meta_model = session.origin.meta_model(model, session.journal.entries[0].before)
        session.origin.restore(model, meta_model, log, optimizers)
        log.add_last(self._tracker.rehook())
        restore_layers(
            self._tracker, session.origin.ids, "the model went back to another state", log.add
        )

    def _redo(
        self, model: nn.Module, entries: Sequence[Entry], log: UndoLog, optimizers: Any
    ) -> None:
        for part in _parts(entries):
            # What the journal claims was held against the state dict before.
            meta_model = meta_model_after(model, part, math.inf)
            load_architecture(
                model, meta_model, moved_buffers(model, part), *places(part), log, optimizers
            )
            for entry in part:
                self._move_ids(entry, log)

    def _move_ids(self, entry: Entry, log: UndoLog) -> None:
        tracker = self._tracker
        known = tracker.current.layers
        for name, runs in entry.layers.items():
            width = len(known[name].ids) if name in known else -1
            if runs.reach > width or runs.size > MOST_NEW + 64 * width:
                raise CheckpointError(
                    f"Entry {entry.number} of the journal moves neurons of {name!r} that it does not have."
                )
        # Ids of changes that were undone in between are not given again.
        tracker.registry.skip_to(min([*entry.added_ids, MOST_IDS]) if entry.added_ids else 0)
        layers = {name: runs.slots() for name, runs in entry.layers.items()}
        born = tracker.registry.free([i for i in entry.added_ids if i < MOST_IDS])
        tracker.remap(layers, {}, entry.reason, log.add, born)
        reads = tracker.current.reads
        log.add(lambda: setattr(tracker.current, "reads", reads))
        tracker.current.reads = {}
        if entry.modules:

            def ids_of(layer: str, neurons: int) -> list[int] | None:
                ids = [] if born is None else [*itertools.islice(born, neurons)]
                return ids if len(ids) == neurons else None

            tracker.sync_layers(entry.reason, log.add, ids_of)

    def save_checkpoint(self, path: str | os.PathLike[str]) -> Path:
        """Save the run into a directory: weights, optimizer, statistics, history, ids, journal, random states.

        One that is there already is replaced at the end: whenever the machine stops, the old or the new one loads.

        Args:
            path: A directory; one that is no checkpoint is not replaced.

        Raises:
            CheckpointError: Something cannot be saved, or `path` is something else.

        Examples:
            >>> engine.save_checkpoint("run").name  # a directory
            'run'
        """
        settings = {
            "activation_threshold": self._tracker.threshold,
            "correlation_threshold": self._analyzer.correlation_threshold,
            "observe": self._tracker.observe_at,
        }
        run = self._run
        content = run_state.dump_state(
            self._tracker,
            unwrapped(self._sessions.current.optimizers),
            self._sessions.history,
            self._sessions.current.journal,
            settings,
            (None, {}, {}) if run is None else run.dump_state(),
        )
        return write_checkpoint(path, content)

    @property
    def _run(self) -> SelfModification | None:
        """The run of the current model."""
        session = self._sessions.present
        found: SelfModification | None = None if session is None else session.run
        return found


class Parts(Protocol):
    """The parts of an engine that a checkpoint is loaded into."""

    tracker: ActivationTracker
    sessions: Sessions
    attachments: Attachments
    trainer: Trainer


E = TypeVar("E", bound=Parts)


def load_engine(
    make: Callable[..., E],
    path: PathLike,
    fresh_model: nn.Module,
    optimizer: Any = None,
    policy: Any = None,
) -> E:
    """An engine of `make` that goes on where a checkpoint was saved; see `NeuronEngine.load_checkpoint`.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit; model and optimizer are as they were.
    """
    content = read_checkpoint(path)
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [o for o in given if o is not None]
    model = unwrap(fresh_model)
    with _all_or_nothing(path) as log:
        facts = content.texts["engine"]
        noise = rng_restorer(content.tensors["random"], facts["random"])
        plain = unwrapped(optimizers)
        check_ownership(model, plain)
        known = [session for session in sessions_of(model) if not session.replaced]
        for session in [s for s in known if len(s.journal)][:1]:
            # It is no fresh model: it becomes what it was at first.
            first = session.origin.meta_model(model, session.journal.entries[0].before)
            held = {id(o): o for o in [*plain, *unwrapped(session.attached()[0])]}
            session.origin.restore(model, first, log, list(held.values()))
        origin, widths = Origin(), {layer.name: layer.neurons for layer in find_layers(model)}
        origin.note_all(model, Journal.from_dict(content.texts["journal"]), {}, plain)
        journal = run_state.load_model(model, content, log)
        load_optimizers(model, plain, content.tensors["optimizer"], facts["optimizers"], log)
        engine = make(**facts["settings"])
        log.add(engine.tracker.release)
        run_state.require_ids(journal, facts["registry"])
        history, seen = run_state.load_tracker(engine.tracker, model, content)
        if facts["run"] is None and policy is not None:
            raise CheckpointError(
                "The checkpoint has no run that a policy could go on with: load it without one, and call "
                "start_self_modification(policy)."
            )
        if facts["run"] is not None:
            saved = facts["run"]["policy"]
            # Several processes may meet only once the engine is there.
            engine.trainer.begin(Policy.from_dict(saved) if policy is None else as_policy(policy))
            run = engine.trainer.run
            assert run is not None
            log.add(engine.trainer.stop_self_modification)
            tables = content.tensors["statistics"]
            look = {name: t for name, t in tables.items() if name.startswith("look.")}
            run.restore_state(facts["run"], seen, look)
    for session in [s for s in known if len(s.journal) or len(journal)]:
        session.replace()
    engine.attachments.attach_optimizer(*optimizers)
    session = engine.sessions.current
    session.journal, session.origin = journal, origin
    for name, layer in session.entry.layers.items():
        first_ids = engine.tracker.registry.first_ids(layer, widths.get(name) or 0)
        origin.ids.update({name: first_ids} if first_ids else {})
    if history is not None:
        session.history = history
    noise()
    return engine


def _require_no_followers(session: Session, found: Found) -> None:
    """Refuse to change a model and not its copies: their weights are in another file.

    Raises:
        CheckpointError: Copies follow it.
    """
    if (found.back or found.entries) and session.attached()[1]:
        raise CheckpointError(
            f"This state dict changes the shapes of {session.entry.name!r}, and a copy follows it, whose weights it "
            "does not hold. Call detach_follower(copy) first; after the load make the copy anew and attach it."
        )


def _changed_since(known: Sequence[Entry], found: Found) -> set[str]:
    """Tensors of which the slots are others once the changes of a state dict are made."""
    pairs = enumerate(itertools.zip_longest(known, found.entries))
    same = next((number for number, (mine, theirs) in pairs if mine != theirs), len(known))
    return {name for entry in [*known[same:], *found.entries[same:]] for name in entry.slots}


def _forget_states(
    model: nn.Module, optimizers: Sequence[Optimizer], changed: Collection[str]
) -> None:
    """Let optimizers forget what they know of other slots: it would be read as that of the new ones."""
    named = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in [p for p in optimizer.state if named.get(id(p)) in changed]:
            del optimizer.state[parameter]
        for parameter in [p for p in optimizer.state if p.shape != _shape(optimizer, p)]:
            # Moments of another shape would be read beyond their end.
            del optimizer.state[parameter]
        watch(optimizer)  # the ages of young slots come with its state


def _shape(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Size:
    """The shape that an optimizer's state of a parameter was made for."""
    known = [
        v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.ndim
    ]
    return known[0].shape if known else parameter.shape


def _parts(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries up to each one that brings a new layer: what lies between is never made, however large."""
    part: list[Entry] = []
    for entry in entries:
        part.append(entry)
        if entry.modules:
            yield part
            part = []
    if part:
        yield part


def apply_journal(fresh_model: nn.Module, path: PathLike) -> nn.Module:
    """Give a freshly built model the architecture and the weights of a checkpoint, for deployment; return it.

    Args:
        fresh_model: Built by the original code, at its original sizes; it is changed in place.
        path: Of the checkpoint.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit; the model is as it was.

    Examples:
        >>> from tracker import apply_journal
        >>> receipt = engine.prune_neurons({"0": [1]})
        >>> path = engine.save_checkpoint("run")
        >>> fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> torch.equal(apply_journal(fresh, path)(x), model(x))
        True
    """
    content = read_checkpoint(path)
    with _all_or_nothing(path) as log:
        run_state.load_model(unwrap(fresh_model), content, log)
    return fresh_model


@contextmanager
def _all_or_nothing(path: PathLike) -> Iterator[UndoLog]:
    """On any error inside, what the log knows and the random states are as they were, and it is a CheckpointError."""
    log, noise = UndoLog(), rng_snapshot()
    try:
        with torch.inference_mode(False):
            yield log
    except BaseException as error:
        log.undo()
        noise()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"The checkpoint {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error

"""The facade: what looks (`NeuronWatcher`), tells (`NeuronAdviser`), changes (`NeuronSurgeon`), and what remembers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tracker import figures, memory, page
from tracker.checks import checked
from tracker.distributed import refuse_alone
from tracker.errors import CheckpointError, StatisticsError, SurgeryError
from tracker.journal import Entry, become, read_checkpoint, twin_after, write_checkpoint
from tracker.journal.carry import carry
from tracker.journal.noise import here, restorer
from tracker.journal.optimizers import check_ownership, load_optimizers
from tracker.layers import find_layers, unwrap
from tracker.life import life
from tracker.session import Session
from tracker.surgeon import NeuronSurgeon
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.newborn import watch
from tracker.surgery.optimizers import unwrapped
from tracker.training import Decision, Policy, SelfModification, as_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self


MOST_IDS = 2**16  # new neurons that a layer may get at once, beside 64 times those that it has


@checked(
    SurgeryError,
    itself=("loss", "policy", "epoch", "train_loss", "train_acc"),
    save_checkpoint=CheckpointError,
    load_checkpoint=CheckpointError,
)
class NeuronEngine(NeuronSurgeon):
    """Watches every neuron of a model, tells which ones matter, and removes them in place.

    Calls speak of the current model: the last one that was tracked, or whose hooks were registered. Calls that begin
    with `print_`, and the two reports `generate_neuron_report` and `generate_pruning_recommendations`, print; all
    others are silent and return records.

    Args:
        activation_threshold: A neuron fires where |activation| is larger.
        correlation_threshold: |Pearson correlation| from which on two neurons are redundant.
        observe: "reads": a neuron is observed where its consumers read it, behind its nonlinearity (where structure
            cannot tell, at its layer's output); "output": each layer's own output.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> engine = NeuronEngine()
        >>> engine.track_model(model, "tiny")
        {'0': [0, 1, 2], '2': [3, 4]}
        >>> engine.start_tracking()
        >>> _ = model(torch.ones(8, 4))
        >>> engine.stop_tracking()
        >>> engine.get_neuron_stats(0)["observations"]
        8
    """

    def start_self_modification(self, policy: Any = None) -> None:
        """Let the current model change itself while it trains, as the policy says; call `step` after each step.

        Between looks nothing is observed. Model, optimizer and scheduler stay the same objects.

        Args:
            policy: A Policy, Phases, a function or an object with `decide` (see `Policy.of`); None for the default one.

        Raises:
            SurgeryError: `policy` is none of these, or protects what is not there.
        """
        chosen = Policy() if policy is None else as_policy(policy)
        session = self._session
        refuse_alone(session.ranks)
        if session.run is not None:
            session.run.stop()
        session.run = run = SelfModification(self, chosen)
        session.clock = lambda: run.steps

    def step(self, loss: torch.Tensor | float, *, model: nn.Module | None = None) -> Receipt | None:
        """After each optimizer step: None, or the receipt of what was just changed or taken back.

        Args:
            loss: Of this step.
            model: Which one took it. None: the one that modifies itself; of several, the current one.

        Without `start_self_modification` it does nothing: one script serves with and without.

        Raises:
            SurgeryError: Several models modify themselves and none of them is the current one, or the loss is not one
                number.
        """
        session = self._that_runs(model)
        if session is None:
            return None
        with self._tracker.speaking_of(session.entry):
            receipt: Receipt | None = session.run.step(loss)
            return receipt

    def stop_self_modification(self) -> None:
        """Have no model change itself any more; `life` stays."""
        for session in self._sessions.values():
            if session.run is not None:
                session.run.stop()

    @property
    def life(self) -> list[Decision]:
        """What was decided so far, and why: changes, refusals, and looks at which nothing was to be done.

        Of the current model, or of the one model that modified itself.
        """
        runs = [s.run for s in self._sessions.values() if s.run is not None]
        run = self._own_run or (runs[0] if len(runs) == 1 else None)
        return [] if run is None else run.life

    def _that_runs(self, model: nn.Module | None) -> Session | None:
        """The session whose run takes a step; None where nothing modifies itself."""
        if model is not None:
            running = [self._session_of(self._tracker.tracked(model))]
        else:
            running = [s for s in self._sessions.values() if s.run is not None]
            live = [s for s in running if not s.run.stopped]
            running = live or running
            running = [s for s in running if s.entry is self._tracker.current] or running
        if not running or running[0].run is None:
            return None
        if len(running) > 1:
            names = ", ".join(repr(s.entry.name) for s in running)
            raise SurgeryError(
                f"Several models modify themselves ({names}): say which, step(loss, model=model)."
            )
        return running[0]

    def log_epoch_statistics(
        self, epoch: int, train_loss: float | None = None, train_acc: float | None = None
    ) -> None:
        """Remember the current window, and the epoch's loss and accuracy, in the history.

        Raises:
            StatisticsError: Nothing was observed since `start_tracking`.
        """
        super().log_epoch_statistics(epoch, train_loss, train_acc)
        if train_acc is not None and self._own_run is not None:
            self._own_run.accuracies.append((self._own_run.steps, float(train_acc)))

    def plot_life(self, path: PathLike[str] | str | None = None) -> Figure:
        """Widths, births and deaths, loss and accuracy since `start_self_modification`; saved to `path` if given.

        Raises:
            StatisticsError: There was no run, or no step of it.
        """
        run = self._own_run
        if run is None:
            raise StatisticsError(
                "There is no life to draw: the current model did not modify itself. Call start_self_modification first."
            )
        return figures.save(life(run, self.journal, self._tracker.current.name), path)

    def save_html_report(self, path: PathLike[str] | str) -> Path:
        """Write one self-contained HTML page: the run's life, layers, training, changes and decisions."""
        observation, findings = self._findings()
        current = self._tracker.current
        return page.write(
            page.Run(
                current.name,
                observation,
                findings,
                self.history,
                self.journal,
                self.count_parameters(),
                "" if current.structure is None else str(current.structure),
                self._own_run,
            ),
            path,
        )

    @property
    def _own_run(self) -> SelfModification | None:
        """The run of the current model."""
        run: SelfModification | None = self._session.run if self._tracker.models else None
        return run

    def carry_journal(self) -> None:
        """Have the current model's `state_dict` carry its journal, and `load_state_dict` replay one.

        Call it after `track_model`, before the load. Then checkpoints of other frameworks load into freshly built
        models: architecture, weights and ids. Optimizer state is loaded by the framework, after the model's.
        """
        session = self._session
        model = session.entry.model()
        if not session.carried:
            session.carried = True
            journal, this, held = session.journal, weakref.ref(self), weakref.ref(model)

            def replay(entries: Sequence[Entry]) -> None:
                engine, own = this(), held()
                assert own is not None
                if engine is None:  # nobody asks for ids any more
                    journal.replay(own, entries)
                else:
                    engine._replay(own, entries)
                journal.entries += entries

            carry(model, lambda: journal, replay)

    def _replay(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        """Do changes of a journal again, on the model and in what the tracker knows of it; all or nothing.

        Raises:
            CheckpointError: They do not fit what is tracked.
        """
        tracker = self._tracker
        session = self._session_of(tracker.tracked(model))
        plain = unwrapped(session.optimizers)
        with tracker.speaking_of(session.entry):
            with _all_or_nothing("of the state dict") as log:
                for part in _parts(entries):
                    # What the journal claims was held against the state dict before.
                    twin = twin_after(model, part, math.inf)
                    become(model, twin, {}, part, log, plain)
                    for entry in part:
                        self._move_ids(entry, log)
                session.know(log)
                widths = {n: len(layer.ids) for n, layer in tracker.current.layers.items()}
                for layer in find_layers(model):
                    if layer.neurons is not None and widths.get(layer.name) != layer.neurons:
                        raise CheckpointError(
                            f"The journal gives {layer.name} {layer.neurons} neurons and "
                            f"{widths.get(layer.name, 'no')} ids."
                        )
            for optimizer in plain:  # moments of another shape would be read beyond their end
                for parameter in [p for p in optimizer.state if p.shape != _shape(optimizer, p)]:
                    del optimizer.state[parameter]
                watch(optimizer)  # the ages of young slots come with its state
        session.last = None
        session.changed()

    def _move_ids(self, entry: Entry, log: UndoLog) -> None:
        tracker = self._tracker
        known = tracker.current.layers
        for name, runs in entry.layers.items():
            width = len(known[name].ids) if name in known else -1
            if runs.reach > width or runs.size > MOST_IDS + 64 * width:
                raise CheckpointError(
                    f"Entry {entry.number} of the journal moves neurons of {name!r} that it does not have."
                )
        layers = {name: runs.slots() for name, runs in entry.layers.items()}
        tracker.reslot(layers, {}, entry.reason, log.add)
        reads, tracker.current.reads = tracker.current.reads, {}
        log.add(lambda: setattr(tracker.current, "reads", reads))
        if entry.modules:
            tracker.resite(entry.reason, log.add)

    def save_checkpoint(self, path: str | PathLike[str]) -> Path:
        """Save the run into a directory: weights, optimizer, statistics, history, ids, journal, random states.

        One that is there already is replaced at the end: whenever the machine stops, the old or the new one loads.

        Raises:
            CheckpointError: Something cannot be saved, or `path` is something else.
        """
        settings = {
            "activation_threshold": self.activation_threshold,
            "correlation_threshold": self.correlation_threshold,
            "observe": self._tracker.observe_at,
        }
        run = self._own_run
        content = memory.gather(
            self._tracker,
            unwrapped(self._session.optimizers),
            self.history,
            self.journal,
            settings,
            (None, {}, {}) if run is None else run.gather(),
        )
        return write_checkpoint(path, content)

    @classmethod
    def load_checkpoint(
        cls, path: str | PathLike[str], fresh_model: nn.Module, optimizer: Any = None
    ) -> Self:
        """An engine that goes on where `save_checkpoint` was called.

        Args:
            path: The directory.
            fresh_model: Built by the original code, at its original sizes; it is changed in place.
            optimizer: One (or a list) of the same class over the fresh model's parameters.

        Raises:
            CheckpointError: The checkpoint is damaged or does not fit; model and optimizer are as they were.
        """
        content = read_checkpoint(path)
        given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        optimizers = [o for o in given if o is not None]
        model = unwrap(fresh_model)
        with _all_or_nothing(path) as log:
            facts = content.texts["engine"]
            noise = restorer(content.tensors["random"], facts["random"])
            plain = unwrapped(optimizers)
            check_ownership(model, plain)
            journal = memory.load_model(model, content, log)
            load_optimizers(model, plain, content.tensors["optimizer"], facts["optimizers"], log)
            engine = cls(**facts["settings"])
            log.add(engine._let_go)
            memory.require_ids(journal, facts["registry"])
            history, seen = memory.load_tracker(engine._tracker, model, content)
            if facts["run"] is not None:
                engine.start_self_modification(Policy.from_dict(facts["run"]["policy"]))
                run = engine._own_run
                assert run is not None
                log.add(engine.stop_self_modification)
                tables = content.tensors["statistics"]
                look = {name: t for name, t in tables.items() if name.startswith("look.")}
                run.go_on(facts["run"], seen, look)
        engine.attach_optimizer(*optimizers)
        session = engine._session
        session.journal = journal
        if history is not None:
            session.history = history
        noise()
        return engine

    def _let_go(self) -> None:
        for entry in self._tracker.models:
            entry.detach()


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


def apply_journal(fresh_model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Give a freshly built model the architecture and the weights of a checkpoint, for deployment; return it.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit; the model is as it was.
    """
    content = read_checkpoint(path)
    with _all_or_nothing(path) as log:
        memory.load_model(unwrap(fresh_model), content, log)
    return fresh_model


@contextmanager
def _all_or_nothing(path: str | PathLike[str]) -> Iterator[UndoLog]:
    """On any error inside, what the log knows and the random states are as they were, and it is a CheckpointError."""
    log, noise = UndoLog(), here()
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

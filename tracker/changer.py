"""What every change goes through: one transaction on all that is attached, in the journal, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tracker.adviser import NeuronAdviser
from tracker.distributed import Ranks, watch_wrapper
from tracker.errors import SurgeryError, UnknownNeuronError
from tracker.identity import layer_named
from tracker.journal import Entry, Journal, When, fingerprint
from tracker.probe import Arguments, quiet_copy
from tracker.structure import Structure
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.latency import PASSES, latency
from tracker.surgery.newborn import watch
from tracker.surgery.optimizers import unwrapped
from tracker.surgery.plan import Plan
from tracker.surgery.receipt import joined
from tracker.surgery.transaction import Witness, carry_out, count, refuse_inside_a_pass

Neurons = Iterable[int] | Mapping[str, Sequence[int]]


class NeuronChanger(NeuronAdviser):
    """Attached optimizers, followers and processes; journal; undo. The changes themselves are `NeuronSurgeon`'s."""

    def __init__(self, *thresholds: float, **options: Any) -> None:
        super().__init__(*thresholds, **options)
        self._optimizers: list[Any] = []
        self._followers: list[nn.Module] = []
        self._undo: UndoLog | None = None
        self._journals: dict[int, Journal] = {}  # by position of the model
        self._clock: Callable[[], int] | None = None  # steps of a run, for the journal
        self._ranks: Ranks | None = None
        self._merged: int | None = None  # version of the window that all ranks share

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together: traced when first asked; the model is not changed.

        Raises:
            StructureError: The model has not run yet and no example inputs were given, or it cannot be traced.
        """
        return self._tracker.structure()

    def count_parameters(self) -> int:
        """Numbers in the current model's parameters, each counted once."""
        return count(self._tracker.current.model())

    def measure_latency(self, passes: int = PASSES) -> float:
        """Milliseconds of a forward pass of the example inputs: wall time, the median of so many passes.

        In eval mode and without gradients, as the model runs now on its device; two more passes warm up.

        Raises:
            SurgeryError: `passes` is no whole number above 0.
            StructureError: The model has not run yet and no example inputs were given, or they do not fit it.
        """
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise SurgeryError(f"Latency is measured in 1 or more passes, not {passes!r}.")
        _ = self.structure  # tells what is missing
        entry = self._tracker.current
        assert entry.observer.inputs is not None
        return latency(quiet_copy(entry.model()), Arguments(*entry.observer.inputs), passes)

    def attach_optimizer(self, *optimizers: Any) -> None:
        """Have the state of these optimizers move with every change of the model."""
        self._optimizers += [
            o for o in optimizers if not any(o is known for known in self._optimizers)
        ]
        for optimizer in unwrapped(optimizers):
            watch(optimizer)  # a state that is loaded into it may be that of a model that grew

    def attach_process_group(self, group: Any = None) -> None:
        """Change the current model's replicas on all ranks of a group (None: all processes) alike, or none of them.

        From here on every change, `calibrate` and `merge_statistics` are collectives: all ranks call them in the same
        order. The plan's numbers are the first rank's. After a change, a DistributedDataParallel wrapper is to be
        made anew: `model = tracker.renew(model)`.

        Raises:
            SurgeryError: torch.distributed is not initialised.
            VerificationError: The replicas, or the states of their attached optimizers, are not the same.
        """
        ranks = Ranks(group)
        ranks.require_same_model(self._tracker.current.model(), self._optimizers)
        self._ranks = ranks

    def merge_statistics(self) -> None:
        """End the window, and give each rank the statistics of all; the next begins with `start_tracking`.

        Raises:
            SurgeryError: `attach_process_group` was not called.
        """
        if self._ranks is None:
            raise SurgeryError("There are no ranks to merge: call attach_process_group first.")
        observer = self._tracker.current.observer
        self.stop_tracking()
        if self._merged != observer.version:
            self._ranks.merge_windows(observer)
            self._merged = observer.version

    def _met(self, model: nn.Module) -> None:
        watch_wrapper(model)

    def attach_follower(self, *models: nn.Module) -> None:
        """Have these copies of the model (an EMA, say) change alike."""
        self._followers += [m for m in models if not any(m is known for known in self._followers)]

    @property
    def journal(self) -> Journal:
        """Every change of the current model so far, in order."""
        return self._journals.setdefault(self._model_key(), Journal())

    def undo(self) -> None:
        """Take the last change back, bit for bit: model, gradients, optimizer state, ids, statistics.

        Raises:
            SurgeryError: There is no change to take back.
        """
        if self._undo is None:
            raise SurgeryError("There is no change to undo: only the last one can be taken back.")
        self._undo.undo()
        self._undo = None

    def _together(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.together(what)

    def _change(
        self, plan: Callable[[], tuple[Plan, list[str]]], *, dry_run: bool, verify: bool
    ) -> Receipt:
        model, last, log = self._tracker.current.model(), self._undo, UndoLog()
        try:
            # What is made inside the caller's inference mode could not be written.
            with torch.inference_mode(False):
                with self._together("A change"):
                    refuse_inside_a_pass(self._tracker)
                    before = fingerprint(model)
                    drawn, notes = plan()
                if self._ranks is not None:
                    self._ranks.agree(drawn)
                with self._together("A change"):
                    receipt, _ = carry_out(
                        self._tracker,
                        drawn,
                        self._optimizers,
                        self._followers,
                        dry_run=dry_run,
                        verify=verify,
                        notes=notes,
                        log=log,
                    )
                if self._ranks is not None:
                    self._ranks.require_same_model(model, self._optimizers)
            if not dry_run:
                self._note(drawn, receipt, (before, fingerprint(model)), log)
                self._undo = log
            return receipt
        except BaseException:
            log.undo()
            self._undo = last
            raise

    def _note(
        self, plan: Plan, receipt: Receipt, fingerprints: tuple[str, str], log: UndoLog
    ) -> None:
        journal = self.journal
        epochs = self.history.epochs
        step = self._clock() if self._clock is not None else None
        when = When(len(journal) + 1, step, epochs[-1].epoch if epochs else None)
        entry = Entry.of(plan, receipt, fingerprints, when)
        log.add(lambda: journal.take_back(entry))
        journal.add(entry)

    def _change_all(
        self,
        operation: str,
        steps: Sequence[Callable[[], Receipt]],
        skipped: Sequence[str],
        *,
        dry_run: bool,
    ) -> Receipt:
        """Several changes as one: all or none, undone together."""
        if not steps:
            why = "; ".join(skipped[:3]) or "they name nothing"
            raise SurgeryError(f"{operation}: there is nothing to do ({why}).")
        before, whole = self._undo, UndoLog()
        receipts: list[Receipt] = []
        witness = Witness(self._tracker)
        try:
            for step in steps:
                try:
                    receipts.append(step())
                except SurgeryError as error:  # noqa: PERF203
                    skipped = [*skipped, str(error)]
                else:
                    assert self._undo is not None
                    whole.add(self._undo.undo)
            if not receipts:
                raise SurgeryError(f"{operation}: nothing of it can be done ({skipped[-1]}).")
            receipt = joined(operation, receipts, witness.difference(), skipped, dry_run=dry_run)
        except BaseException:
            whole.undo()
            self._undo = before
            raise
        self._undo = whole
        if dry_run:
            self.undo()
            self._undo = before
        return receipt

    def _places(self, neurons: Neurons) -> list[tuple[str, int]]:
        """(layer, local index) of neurons given by ids, or as {layer: local indices}."""
        current = self._tracker.current
        places: list[tuple[str, int]] = []
        if isinstance(neurons, Mapping):
            for layer, indices in neurons.items():
                size = len(current.layers[layer_named(list(current.layers), layer)].ids)
                wrong = [i for i in indices if not isinstance(i, int) or not 0 <= i < size]
                if wrong:
                    raise UnknownNeuronError(
                        f"Layer {layer!r} has no neuron {wrong[0]!r}: its local indices are 0 to {size - 1}."
                    )
                places += [(layer, i) for i in indices]
            return places
        listed: object = neurons
        if not isinstance(listed, Iterable) or isinstance(listed, str):
            raise UnknownNeuronError(
                f"Neurons are named by a list of ids, or as {{layer: [local indices]}}, not by {neurons!r}."
            )
        for neuron in neurons:
            entry, index = self._tracker.registry.find(neuron)
            if current.layers.get(entry.layer) is not entry:
                raise UnknownNeuronError(
                    f"Neuron {neuron} belongs to the model {entry.model!r}, not to {current.name!r}."
                )
            places.append((entry.layer, index))
        return places

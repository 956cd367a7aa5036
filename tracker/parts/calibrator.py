"""What changes are computed and priced from: statistics of calibration data, and batches to measure on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tracker.inputs.batches import BatchReader, Inputs, each
from tracker.parts.changer import Changer
from tracker.parts.sessions import Sessions
from tracker.structure.trials.temporary_copies import copy_sharing_storage
from tracker.surgery.calibration.consumers import Consumer, collect, consumers
from tracker.surgery.calibration.held_back import Batches, measured
from tracker.surgery.calibration.loss import Loss, Objective
from tracker.surgery.calibration.report import Calibrated
from tracker.surgery.loss_change import LossForecast
from tracker.surgery.operations.batch_norm_statistics import reestimate
from tracker.surgery.plan import Plan
from tracker.surgery.transaction import unchanged
from tracker.tracker import ActivationTracker


class Calibrator:
    """Calibrates the current model, and keeps by what.

    Args:
        tracker: Holds models and what their consumers read.
        sessions: Where a model's calibration is kept.
        changer: Tells the structure, and carries out the rounds of a compression.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions, changer: Changer) -> None:
        self._tracker = tracker
        self._sessions = sessions
        self._changer = changer

    def calibrate(
        self,
        batches: Iterable[Any],
        limit: int | None = None,
        *,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        patches: bool = False,
        progress: bool | None = None,
    ) -> Calibrated:
        """Observe what the consumers of prunable groups read, for changes that make up for what goes.

        One pass in eval mode over `batches` (or the first `limit`), a data loader, say. Each is what the model takes (a
        tensor, a tuple of positional arguments, a dict of keyword arguments, a `Call`), or that with targets: (inputs,
        targets), or a dict with more keys than `forward` has arguments. Which part the model takes, its forward
        signature and its example calls tell; the logger "tracker" has one line about it. Where they do not tell,
        `inputs` does. Takes (columns)² numbers of 8 bytes for each consumer.

        Gradients of the first batches tell what errors of the consumers cost in `loss`. Without one, the loss is the
        divergence from the model's own predictions where its outputs are logits by name or log-probabilities, else the
        squared change of its outputs. Where no gradients can be taken, errors count relative to what each consumer puts
        out.

        Args:
            batches: What is gone through, once.
            limit: At most so many batches.
            loss: `loss(output, batch)`: one number, the mean over the batch; the batch as it was given, targets too.
            inputs: What the model takes of a batch: `inputs=lambda batch: batch[0]`, say.
            patches: Fit convolutions place by place of their kernels, not channel by channel: nearer, and slower, since
                each channel is as many columns as the kernel has places.
            progress: Whether a bar is shown; None: on terminals and in notebooks.

        Returns:
            Consumers that were observed: a number that prints as which layers, with how many samples, what was taken
            of a batch, and in which loss changes are priced (`layers`, `samples`, `batches`, `taken`, `loss`).

        Raises:
            SurgeryError: There is no batch, or nothing tells which part of one the model takes.
            StructureError: The model cannot be called with a batch.

        Examples:
            >>> cross_entropy = lambda output, batch: nn.functional.cross_entropy(output, batch[1])
            >>> engine.calibrate([(x, y)], loss=cross_entropy)
            calibrated: what 2 layers read, with 64 samples in 1 batch
              layers: 2, 4
              of each batch the model takes (Tensor(64, 4)), not [1] Tensor(64,)
              changes are priced in: the given loss
            >>> engine.prune_neurons({"0": [1]}, dry_run=True).predicted_loss_change is None
            False
        """
        reader = self.reader(inputs, loss=loss)
        session = self._sessions.current
        entry, objective = session.entry, Objective(loss)
        some = Batches(
            batches,
            reader,
            limit=limit,
            hold_back=False,
            batch_dim=entry.observer.batch_dim,
            progress=progress,
        )
        count = self._calibrate(some, objective, patches=patches)
        priced = all(read.loss is not None for read in entry.reads.values())
        kind = None
        if priced and session.ranks is None and session.calibration is not None:
            with entry.observer.paused():
                kind = session.calibration.kind(entry.model())
        layers = dict.fromkeys(c.module for c in self.consumers() if c.weight in entry.reads)
        return Calibrated(count, tuple(layers), some.samples, some.count, reader.told, kind)

    def reestimate_norms(
        self,
        batches: Iterable[Any],
        limit: int | None = None,
        *,
        inputs: Inputs | None = None,
        progress: bool | None = None,
    ) -> list[str]:
        """Take the running statistics of batch norms anew; `undo` gives them back. Arguments as for `calibrate`.

        After channels went, the old ones describe another network.

        Args:
            batches: Of the model's inputs, as for `calibrate`.
            limit: Batches at most; None: all.
            inputs: As for `calibrate`.
            progress: Whether a bar is shown; None: on terminals and in notebooks.

        Returns:
            Names of these norms.

        Raises:
            SurgeryError: No norm keeps running statistics, or no batch reached one.

        Examples:
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
            >>> _ = engine.track_model(net, "normed", example_inputs=x)
            >>> receipt = engine.prune_neurons({"0": [1]}, compensate=False)
            >>> engine.reestimate_norms(x.split(16))
            ['1']
        """
        entry, reader = self._tracker.current, self.reader(inputs)
        some = map(reader.read, each(reader, batches, "Norms", progress, limit))
        with entry.observer.paused(), self._sessions.current.transaction() as change:
            names = reestimate(entry.model(), some, change.log)
            change.receipt = unchanged("reestimate_norms", entry)
        return names

    def _calibrate(self, batches: Batches, objective: Objective, *, patches: bool = False) -> int:
        entry = self._tracker.current
        with entry.observer.paused(), self._changer.together("calibrate"):
            reads = collect(
                entry.model(), batches, self.consumers(), patches=patches, objective=objective
            )
        session = self._sessions.current
        entry.reads = reads if session.ranks is None else session.ranks.merge_reads(reads)
        session.calibration = batches.calibration(objective)
        return len(entry.reads)

    def calibrate_by(
        self,
        batches: Iterable[Any],
        loss: Loss | None,
        inputs: Inputs | None,
        progress: bool | None,
    ) -> None:
        """Calibrate for one change, with some batches held back to measure it on."""
        reader = self.reader(inputs, loss=loss)
        alone = self._sessions.current.ranks is None
        some = Batches(batches, reader, hold_back=alone, progress=progress)
        self._calibrate(some, Objective(loss))

    def reader(self, inputs: Inputs | None, *, loss: object = None) -> BatchReader:
        """What tells which part of a batch the current model takes."""
        entry = self._tracker.current
        return BatchReader(entry.model(), entry.observer.calls, inputs, targets=loss is not None)

    @contextmanager
    def calibrating(self, *, dry_run: bool) -> Iterator[None]:
        """What is calibrated inside stays, unless it is for a dry run or something fails."""
        session = self._sessions.current
        entry, before, reads = session.entry, session.calibration, dict(session.entry.reads)
        try:
            yield
        except BaseException:
            dry_run = True
            raise
        finally:
            if dry_run:
                entry.reads, session.calibration = reads, before

    def consumers(self) -> list[Consumer]:
        """What reads the units of prunable groups."""
        groups = [g for g in self._changer.structure.groups if g.prunable]
        return consumers(self._tracker.current.model(), groups)[0]

    def measured(self, plan: Plan, notes: list[str]) -> tuple[Plan, list[str]]:
        """The plan with the loss that was measured after it, where there are batches to measure on."""
        session = self._sessions.current
        calibration = session.calibration if session.ranks is None else None
        if calibration is None or not calibration.batches:
            return plan, notes
        with session.entry.observer.paused():
            plan, note = measured(session.entry.model(), plan, calibration)
        told = [n for n in calibration.reader.notes() if n not in notes]
        return plan, [*notes, note, *told]

    def measuring(self) -> Callable[[], tuple[LossForecast, list[str]]]:
        """Call it before several changes; what it gives, called after them, measures the loss before and after all.

        What it gives returns nothing measured where there are no batches to measure on.
        """
        session = self._sessions.current
        if session.ranks is not None:  # nothing is measured on several
            return lambda: (LossForecast(), [])
        with session.entry.observer.paused():
            before = copy_sharing_storage(session.entry.model())

        def measure() -> tuple[LossForecast, list[str]]:
            calibration = session.calibration
            if calibration is None or not calibration.batches:
                return LossForecast(), []
            model = session.entry.model()
            with session.entry.observer.paused():
                found = LossForecast(
                    loss=calibration.kind(model),
                    loss_before=calibration.value(before, before),
                    loss_after=calibration.value(model, before),
                )
            return found, [f"measured on {calibration.told()}", *calibration.reader.notes()]

        return measure

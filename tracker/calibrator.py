"""What changes are computed and priced from: statistics of calibration data, and batches to measure on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from tracker.batches import BatchReader, Inputs, each
from tracker.changer import NeuronChanger
from tracker.checks import checked
from tracker.compensation.criteria import Criterion
from tracker.errors import SurgeryError
from tracker.surgery import Receipt
from tracker.surgery.calibration import Consumer, collect, consumers
from tracker.surgery.compression import plan_compression
from tracker.surgery.held_back import Batches, measured, with_all
from tracker.surgery.norms import reestimate
from tracker.surgery.objective import Loss, Objective
from tracker.surgery.plan import Plan
from tracker.surgery.problem import Limits, limits_of
from tracker.surgery.protection import Protect
from tracker.surgery.shortfall import Asked
from tracker.surgery.transaction import refuse_inside_a_pass, unchanged

MOST_ROUNDS = 1000


@checked(
    SurgeryError,
    itself=(
        "neurons",
        "neuron_ids",
        "pairs",
        "tolerance",
        "count",
        "keep",
        "batches",
        "protect",
        "floor",
        "round_to",
    ),
)
class NeuronCalibrator(NeuronChanger):
    """Calibrates the current model, and keeps by what."""

    def calibrate(
        self,
        batches: Iterable[Any],
        limit: int | None = None,
        *,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        patches: bool = False,
        progress: bool | None = None,
    ) -> int:
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
            Consumers that were observed.

        Raises:
            SurgeryError: There is no batch, or nothing tells which part of one the model takes.
            StructureError: The model cannot be called with a batch.
        """
        reader = self._reader(inputs, loss=loss)
        some = Batches(batches, reader, limit=limit, hold_back=False, progress=progress)
        return self._calibrate(some, Objective(loss), patches=patches)

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

        Returns:
            Names of these norms.

        Raises:
            SurgeryError: No norm keeps running statistics, or no batch reached one.
        """
        entry, reader = self._tracker.current, self._reader(inputs)
        some = map(reader.read, each(reader, batches, "Norms", progress, limit))
        with entry.observer.paused(), self._session.transaction() as change:
            names = reestimate(entry.model(), some, change.log)
            change.receipt = unchanged("reestimate_norms", entry)
        return names

    def compress(
        self,
        keep: float = 0.5,
        of: str = "parameters",
        *,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        rounds: int = 1,
        round_to: int = 1,
        floor: int | Mapping[str, int] = 1,
        protect: Protect = (),
        inexact: bool = False,
        criterion: str | Criterion = "reconstruction",
        compensate: bool = True,
        strict: bool = False,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Shrink the whole model to a share of its parameters, FLOPs, or prunable units ("neurons").

        One budget over all groups, and then one change, in which the consumers take over what goes. Units are priced by
        what the loss is predicted to rise by. Before anything is touched, that allocation, even shares, and one half
        way between are tried on copies, and the best on calibration data that were held back is taken: each fourth
        batch of `batches` (after `calibrate`, they are of those that it saw). The receipt says what was measured.

        Args:
            keep: The share that stays, met to within 2% of the whole, or by the nearest below.
            of: "parameters" or "flops" of the model, or "neurons": units of the groups that can shrink.
            batches: Calibration data, as for `calibrate`; without them, what was observed before.
            loss: As for `calibrate`, of `batches`.
            inputs: As for `calibrate`, of `batches`.
            rounds: In how many steps the budget is spent. After each, `batches` are observed anew: the errors of one
                layer are the inputs of the next. Each is an entry of the journal; `undo` takes all back.
            round_to: Widths are to be multiples of it.
            floor: Units that must stay in each group, or in some: {name or pattern, as for `protect`: units}.
            protect: What is left alone: names or patterns ("encoder.*") of layers, modules or groups, and neuron ids;
                or {name or pattern: share of its units that stays}. A name that matches nothing is an error.
            inexact: Whether groups may shrink that a norm runs over (the residual stream).
            criterion: Which units of a group go first: by what the consumers lose once the others take over, or, as
                baselines, "magnitude", "taylor" (of the gradients that are there), "activity", "fluctuation",
                "random", one registered with `tracker.compensation.criterion`, or such a function itself.
            compensate: Whether the consumers take over what goes.
            strict: Refuse a budget that cannot be met to within 2%, as widths change in steps.
            progress: Whether bars are shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: It cannot be met, nothing was touched; the message says why.
        """

        def limits() -> Limits:
            return limits_of(self._tracker, round_to, floor, protect, sizes, inexact=inexact)

        with self._together("compress"):
            refuse_inside_a_pass(self._tracker)
            sizes = {g.name: g.size for g in self.structure.groups}
            limits()  # refuses before data are gone through
        given = None if batches is None else list(batches) if rounds > 1 else batches

        def once(share: float, asked: Asked | None = None) -> Receipt:
            if given is not None:
                self._calibrate_by(given, loss, inputs, progress)

            def plan() -> tuple[Plan, list[str]]:
                return self._plan_compression(
                    share,
                    of,
                    limits(),
                    criterion=criterion,
                    compensate=compensate,
                    strict=strict,
                    progress=progress,
                    asked=asked,
                )

            return self._change(plan, dry_run=dry_run and rounds == 1, verify=verify)

        with self._calibrating(dry_run=dry_run):
            if rounds == 1:
                return once(keep)
            return self._in_rounds(once, keep, rounds, of, dry_run=dry_run)

    def _calibrate(self, batches: Batches, objective: Objective, *, patches: bool = False) -> int:
        entry = self._tracker.current
        with entry.observer.paused(), self._together("calibrate"):
            reads = collect(
                entry.model(), batches, self._consumers(), patches=patches, objective=objective
            )
        session = self._session
        entry.reads = reads if session.ranks is None else session.ranks.merge_reads(reads)
        session.calibration = batches.calibration(objective)
        return len(entry.reads)

    def _calibrate_by(
        self,
        batches: Iterable[Any],
        loss: Loss | None,
        inputs: Inputs | None,
        progress: bool | None,
    ) -> None:
        """Calibrate for one change, with some batches held back to measure it on."""
        reader = self._reader(inputs, loss=loss)
        alone = self._session.ranks is None
        some = Batches(batches, reader, hold_back=alone, progress=progress)
        self._calibrate(some, Objective(loss))

    def _reader(self, inputs: Inputs | None, *, loss: object = None) -> BatchReader:
        """What tells which part of a batch the current model takes."""
        entry = self._tracker.current
        return BatchReader(entry.model(), entry.observer.calls, inputs, targets=loss is not None)

    @contextmanager
    def _calibrating(self, *, dry_run: bool) -> Iterator[None]:
        """What is calibrated inside stays, unless it is for a dry run or something fails."""
        session = self._session
        entry, before, reads = session.entry, session.calibration, dict(session.entry.reads)
        try:
            yield
        except BaseException:
            dry_run = True
            raise
        finally:
            if dry_run:
                entry.reads, session.calibration = reads, before

    def _consumers(self) -> list[Consumer]:
        groups = [g for g in self.structure.groups if g.prunable]
        return consumers(self._tracker.current.model(), groups)[0]

    def _measured(self, plan: Plan, notes: list[str]) -> tuple[Plan, list[str]]:
        """The plan with the loss that was measured after it, where there are batches to measure on."""
        session = self._session
        calibration = session.calibration if session.ranks is None else None
        if calibration is None or not calibration.batches:
            return plan, notes
        with session.entry.observer.paused():
            plan, note = measured(session.entry.model(), plan, calibration)
        told = [n for n in calibration.reader.notes() if n not in notes]
        return plan, [*notes, note, *told]

    def _plan_compression(
        self, share: float, of: str, limits: Limits, **options: Any
    ) -> tuple[Plan, list[str]]:
        session = self._session
        entry = session.entry
        calibration = session.calibration if session.ranks is None else None

        def use_all() -> None:
            if calibration is not None and calibration.unseen:
                with entry.observer.paused():
                    entry.reads = with_all(
                        entry.model(), entry.reads, calibration, self._consumers()
                    )

        return plan_compression(
            self._tracker, share, of, limits, calibration=calibration, chosen=use_all, **options
        )

    def _in_rounds(
        self,
        once: Callable[[float, Asked], Receipt],
        keep: float,
        rounds: int,
        of: str,
        *,
        dry_run: bool,
    ) -> Receipt:
        """The same share each time, so that together they come to `keep`; all or none."""
        if not 0 < rounds <= MOST_ROUNDS:
            raise SurgeryError(f"A budget is spent in 1 to {MOST_ROUNDS} rounds, not in {rounds}.")
        left = 1.0

        def step(number: int) -> Receipt:
            nonlocal left
            goal = keep ** ((number + 1) / rounds)
            before = sum(g.size for g in self.structure.groups if g.prunable)
            asked = Asked(keep, left, last=number + 1 == rounds)
            receipt = once(min(goal / left, 1 - 1e-6), asked)
            after = sum(g.size for g in self.structure.groups if g.prunable)
            pairs = {
                "parameters": (receipt.parameters_after, receipt.parameters_before),
                "flops": (receipt.flops_after, receipt.flops_before),
                "neurons": (after, before),
            }
            left *= pairs[of][0] / max(pairs[of][1], 1)
            return receipt

        steps = [partial(step, number) for number in range(rounds)]
        return self._change_all("compress", steps, [], dry_run=dry_run, each=True)

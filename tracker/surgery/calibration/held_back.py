"""Calibration batches on their way, some of which are kept to measure changes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tracker.inputs.batches import Batch, BatchReader, each, samples_of
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery.apply import apply
from tracker.surgery.calibration.consumers import Consumer, collect
from tracker.surgery.calibration.loss import Calibration, Objective
from tracker.surgery.loss_change import LossForecast
from tracker.surgery.plan import Plan

EVERY, MOST = 4, 8  # each fourth batch is kept, of the first 32


class Batches:
    """Passes batches on, read, and keeps each fourth; with `hold_back` those are not passed on."""

    def __init__(
        self,
        batches: Iterable[Any],
        reader: BatchReader,
        *,
        hold_back: bool,
        batch_dim: int = 0,
        limit: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self._batches, self._reader = batches, reader
        self._batch_dim = batch_dim
        self._hold_back, self._limit, self._progress = hold_back, limit, progress
        self.kept: list[Any] = []
        self.count = self.samples = 0  # that were passed on
        self._last: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        given_one_by_one = each(
            self._reader, self._batches, "Calibrating", self._progress, self._limit
        )
        for number, given in enumerate(given_one_by_one):
            if number % EVERY == EVERY - 1 and len(self.kept) < MOST:
                self.kept.append(given)
                if self._hold_back:
                    continue
            self._last = [given]
            batch = self._reader.read(given)
            self.count += 1
            self.samples += samples_of(batch.call, self._batch_dim)
            yield batch

    def calibration(self, objective: Objective) -> Calibration:
        """What was kept, after all were passed on; of fewer than four batches the last one, which was."""
        unseen = self._hold_back and bool(self.kept)
        return Calibration(objective, tuple(self.kept or self._last), self._reader, unseen)


def measured(model: nn.Module, plan: Plan, calibration: Calibration) -> tuple[Plan, str]:
    """The same plan with the loss before and after it, measured on a copy, and a note that says on what."""
    with temporary_copy(model) as trial_copy:
        apply(plan, [trial_copy], [])
        before, after = calibration.value(model, model), calibration.value(trial_copy, model)
    outlook = replace(
        plan.outlook or LossForecast(),
        loss=calibration.kind(model),
        loss_before=before,
        loss_after=after,
    )
    return replace(plan, outlook=outlook), f"measured on {calibration.told()}"


def with_all(
    model: nn.Module,
    reads: Mapping[str, ConsumerInput],
    calibration: Calibration,
    wanted: Iterable[Consumer],
) -> dict[str, ConsumerInput]:
    """What consumers read in all batches, once those that were held back have served."""
    some = [one for one in wanted if one.weight in reads]
    kernel_positions = any(reads[one.weight].kernel_positions > 1 for one in some)
    more = collect(model, calibration.read(), some, patches=kernel_positions)
    known: dict[tuple[int, int], Any] = {}  # what some share, they go on sharing
    found = dict(reads)
    for weight, read in more.items():
        before, after = reads[weight].covariance, read.covariance
        key = id(before), id(after)
        if key not in known:
            known[key] = before.merge(after)
        found[weight] = replace(reads[weight], seen=known[key])
    return found

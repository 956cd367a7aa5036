"""What changes are computed and priced from: statistics of calibration data, and batches to measure on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tracker.changer import NeuronChanger
from tracker.surgery import Receipt
from tracker.surgery.calibration import Consumer, collect, consumers
from tracker.surgery.compression import plan_compression
from tracker.surgery.held_back import Batches, measured, with_all
from tracker.surgery.objective import Objective
from tracker.surgery.plan import Plan
from tracker.surgery.problem import Limits


class NeuronCalibrator(NeuronChanger):
    """Calibrates the current model, and keeps by what. The calls are `NeuronSurgeon`'s."""

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
        return plan, [*notes, note]

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
        self, once: Callable[[float], Receipt], keep: float, rounds: int, of: str, *, dry_run: bool
    ) -> Receipt:
        """The same share each time, so that together they come to `keep`; all or none."""
        left = 1.0

        def step(number: int) -> Receipt:
            nonlocal left
            goal = keep ** ((number + 1) / rounds)
            before = sum(g.size for g in self.structure.groups if g.prunable)
            receipt = once(min(goal / left, 1 - 1e-6))
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

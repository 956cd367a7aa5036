"""The part of an engine that shrinks a whole model to a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from tracker.compensation.criteria import Criterion
from tracker.errors import SurgeryError
from tracker.inputs.batches import Inputs
from tracker.modules.names import ByLayer, names_in
from tracker.parts.calibrator import Calibrator
from tracker.parts.changer import Changer
from tracker.parts.sessions import Sessions
from tracker.surgery import Receipt
from tracker.surgery.calibration.held_back import with_all
from tracker.surgery.calibration.loss import Loss
from tracker.surgery.operations.compression import plan_compression
from tracker.surgery.operations.shortfall import KeepRequest
from tracker.surgery.plan import Plan
from tracker.surgery.prices.protection import Protected
from tracker.surgery.prices.removal_problem import Limits, limits_of
from tracker.surgery.transaction import refuse_inside_a_pass
from tracker.tracker import ActivationTracker

MOST_ROUNDS = 1000


class Compressor:
    """Spends one budget over all groups of the current model.

    Args:
        tracker: Holds models, ids and structure.
        sessions: Where a model's calibration is kept.
        changer: Carries out changes.
        calibrator: Tells what they are computed and priced from.
    """

    def __init__(
        self,
        tracker: ActivationTracker,
        sessions: Sessions,
        changer: Changer,
        calibrator: Calibrator,
    ) -> None:
        self._tracker = tracker
        self._sessions = sessions
        self._changer = changer
        self._calibrator = calibrator

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
        floor: int | ByLayer[int] = 1,
        protect: Protected = (),
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
        How many units of each group go is settled by then; which, and what the others take over, all batches say.

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

        Examples:
            >>> receipt = engine.compress(keep=0.6, batches=x.split(16), progress=False, dry_run=True)
            >>> receipt.parameters_before, round(receipt.parameters_after / receipt.parameters_before, 1)
            (115, 0.6)
        """
        # Once: rounds may put other modules in the place of these.
        least, spared = (
            names_in(self._tracker.current.model, g, pattern=True) for g in (floor, protect)
        )

        def limits() -> Limits:
            return limits_of(self._tracker, round_to, least, spared, sizes, inexact=inexact)

        with self._changer.together("compress"):
            refuse_inside_a_pass(self._tracker)
            sizes = {g.name: g.size for g in self._changer.structure.groups}
            limits()  # refuses before data are gone through
        given = None if batches is None else list(batches) if rounds > 1 else batches

        def once(share: float, asked: KeepRequest | None = None) -> Receipt:
            if given is not None:
                self._calibrator.calibrate_by(given, loss, inputs, progress)

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

            return self._changer.change(plan, dry_run=dry_run and rounds == 1, verify=verify)

        with self._calibrator.calibrating(dry_run=dry_run):
            if rounds == 1:
                return once(keep)
            return self._in_rounds(once, keep, rounds, of, dry_run=dry_run)

    def _plan_compression(
        self, share: float, of: str, limits: Limits, **options: Any
    ) -> tuple[Plan, list[str]]:
        session = self._sessions.current
        entry = session.entry
        calibration = session.calibration if session.ranks is None else None

        def use_all() -> bool:
            if calibration is None or not calibration.unseen:
                return False
            with entry.observer.paused():
                entry.reads = with_all(
                    entry.model(), entry.reads, calibration, self._calibrator.consumers()
                )
            session.calibration = replace(calibration, unseen=False)  # from now on, they are
            return True

        return plan_compression(
            self._tracker, share, of, limits, calibration=calibration, chosen=use_all, **options
        )

    def _in_rounds(
        self,
        once: Callable[[float, KeepRequest], Receipt],
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
            before = sum(g.size for g in self._changer.structure.groups if g.prunable)
            asked = KeepRequest(keep, left, last=number + 1 == rounds)
            receipt = once(min(goal / left, 1 - 1e-6), asked)
            after = sum(g.size for g in self._changer.structure.groups if g.prunable)
            pairs = {
                "parameters": (receipt.parameters_after, receipt.parameters_before),
                "flops": (receipt.flops_after, receipt.flops_before),
                "neurons": (after, before),
            }
            left *= pairs[of][0] / max(pairs[of][1], 1)
            return receipt

        steps = [partial(step, number) for number in range(rounds)]
        return self._changer.change_all(
            "compress",
            steps,
            [],
            dry_run=dry_run,
            each=True,
            measuring=self._calibrator.measuring,
        )

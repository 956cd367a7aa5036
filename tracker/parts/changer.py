"""What every change goes through: one transaction on all that is attached, in the journal, alike on all ranks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tracker.distributed.ranks import refuse_alone
from tracker.errors import StructureError, SurgeryError, TrackerError, UnknownNeuronError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks
from tracker.journal import fingerprint
from tracker.modules.names import ByLayer, names_in
from tracker.observation.neuron_ids import NeuronId, layer_named
from tracker.parts.session import Session
from tracker.parts.sessions import Sessions
from tracker.structure import Structure
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.loss_change import LossForecast
from tracker.surgery.optimizer_state.attachments import torch_optimizer
from tracker.surgery.optimizer_state.moments import unwrapped
from tracker.surgery.optimizer_state.stale_steps import unattached
from tracker.surgery.plan import Plan
from tracker.surgery.prices.latency import PASSES, latency
from tracker.surgery.receipt import merge_receipts, taken_back, with_loss
from tracker.surgery.transaction import OutputSnapshot, count, execute, refuse_inside_a_pass
from tracker.tracker import ActivationTracker
from tracker.utils.argument_checks import fits, shown

Neurons = Iterable[int] | ByLayer[Sequence[int]]
MOST_PASSES = 100_000


class Changer:
    """Carries out changes of the current model, and takes them back. Which ones, `Surgeon` says.

    Args:
        tracker: Holds models, ids and structure.
        sessions: What is attached to each model, and its journal.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions) -> None:
        self._tracker = tracker
        self._sessions = sessions

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together: traced when first asked; the model is not changed.

        Raises:
            StructureError: The model has not run yet and no example inputs were given, or it cannot be traced.
        """
        self.require_known(self._sessions.current, StructureError)
        return self._tracker.structure()

    def count_parameters(self) -> int:
        """Numbers in the current model's parameters, each counted once.

        Examples:
            >>> engine.count_parameters()
            115
        """
        return count(self._tracker.current.model())

    def measure_latency(self, passes: int = PASSES) -> float:
        """Milliseconds of a forward pass of the example inputs: wall time, the median of so many passes.

        In eval mode and without gradients, as the model runs now on its device; two more passes warm up.

        Args:
            passes: That are timed; the median counts.

        Raises:
            SurgeryError: `passes` is no whole number above 0.
            StructureError: The model has not run yet and no example inputs were given, or they do not fit it.

        Examples:
            >>> engine.measure_latency() > 0  # milliseconds
            True
        """
        if not fits(passes, int) or not 1 <= passes <= MOST_PASSES:
            raise SurgeryError(
                f"Latency is measured in 1 or more passes (at most {MOST_PASSES:,}), not in {shown(passes)}."
            )
        _ = self.structure  # tells what is missing
        entry = self._tracker.current
        assert entry.observer.inputs is not None
        return latency(copy_without_hooks(entry.model()), Arguments(*entry.observer.inputs), passes)

    def undo(self) -> Receipt:
        """Take the current model's last change back, bit for bit: gradients, optimizer state, ids, statistics too.

        Returns:
            The receipt of the way back: ids that come again in `added_ids`, those of neurons that were added in
            `removed_ids`.

        Raises:
            SurgeryError: There is no change of it to take back.

        Examples:
            >>> receipt = engine.prune_neurons({"0": [1, 2]})
            >>> receipt = engine.undo()
            >>> engine.count_parameters(), receipt.added_ids
            (115, [1, 2])
        """
        session = self._sessions.current
        change = session.last
        if change is None or change.receipt is None:
            raise SurgeryError(
                f"There is no change to undo of {session.entry.name!r}: only its last one can be taken back."
            )
        self.require_known(session)
        session.last = None
        before = session.ids()
        change.log.undo()
        session.changed()
        after = session.ids()
        return replace(
            taken_back(change.receipt),
            added_ids=sorted(after - before),
            removed_ids=sorted(before - after),
        )

    def together(self, what: str) -> AbstractContextManager[None]:
        """Inside, what one rank raises all raise: `what` is under way on all of them, or on this one alone."""
        ranks = self._sessions.current.ranks
        return nullcontext() if ranks is None else ranks.together(what)

    def change(
        self,
        plan: Callable[[], tuple[Plan, list[str]]],
        *,
        dry_run: bool,
        verify: bool,
        skipped: Sequence[str] = (),
    ) -> Receipt:
        """Carry a plan out as one transaction, in the journal and alike on all ranks.

        Args:
            plan: Draws the plan, and gives notes for the receipt; it changes nothing.
            dry_run: Only tell what would happen.
            verify: Compare with what is promised, on a copy in float64 and after the change.
            skipped: What was asked and is not done; `plan` may fill it.

        Raises:
            TrackerError: Refused; nothing was touched, or all was undone.
        """
        session = self._sessions.current
        model, ranks = session.entry.model(), session.ranks
        # What is made inside the caller's inference mode could not be written.
        with torch.inference_mode(False), session.transaction() as change:
            with self.together("A change"):
                refuse_inside_a_pass(self._tracker)
                self.require_known(session)
                before = fingerprint(model)
                drawn, notes = plan()
                if not (dry_run or session.tried):
                    refuse_alone(ranks)
            if ranks is not None:
                ranks.sync_plan(drawn)
            optimizers, followers = session.attached()
            if not (dry_run or session.tried):
                notes = [*notes, *_not_attached(drawn, model, optimizers)]
                for known in [session, *session.others()]:
                    known.origin.note(model, drawn, known.entry.layers, unwrapped(optimizers))
            with self.together("A change"):
                change.receipt, _ = execute(
                    self._tracker,
                    drawn,
                    optimizers,
                    followers,
                    dry_run=dry_run,
                    verify=verify,
                    notes=notes,
                    skipped=skipped,
                    log=change.log,
                )
            if ranks is not None:
                ranks.require_same_model(model, optimizers)
            if not dry_run:
                self._note(drawn, change.receipt, (before, fingerprint(model)), change.log)
            return change.receipt  # inside: nothing can fail once the change is kept

    def _note(
        self, plan: Plan, receipt: Receipt, fingerprints: tuple[str, str], log: UndoLog
    ) -> None:
        session = self._sessions.current
        session.know(log)
        session.note(plan, receipt, fingerprints, log)
        for other in () if session.tried else session.others():
            other.take_in(plan, receipt, fingerprints, log)

    def require_known(self, session: Session, error: type[TrackerError] = SurgeryError) -> None:
        """Refuse where the model is not what it was when this engine last saw it.

        Raises:
            TrackerError: It is not, of the given kind.
        """
        if how := session.changed_by_others():
            raise error(
                f"The model {session.entry.name!r} was changed since this engine last saw it: {how}. Ids and "
                "statistics fit it no more. Take that change back, or go on with a new engine: "
                "NeuronEngine().track_model(model)."
            )

    def change_all(
        self,
        operation: str,
        steps: Sequence[Callable[[], Receipt]],
        skipped: Sequence[str],
        *,
        dry_run: bool,
        each: bool = False,
        measuring: Callable[[], Callable[[], tuple[LossForecast, list[str]]]] | None = None,
    ) -> Receipt:
        """Several changes as one, undone together.

        Args:
            operation: Name of the call.
            steps: The changes.
            skipped: What was asked and is not done.
            dry_run: Only tell what would happen.
            each: Refuse all where one is refused; otherwise it is skipped.
            measuring: Called before the first; what it gives, called after the last, tells the loss before and after
                all of them, and on what it was measured.

        Raises:
            TrackerError: Refused; nothing was touched, or all was undone.
        """
        if not steps:
            why = "; ".join(skipped[:3]) or "they name nothing"
            raise SurgeryError(f"{operation}: there is nothing to do ({why}).")
        with (
            self._sessions.rehearsal() if dry_run else nullcontext(),
            self._sessions.current.transaction() as whole,
        ):
            receipts: list[Receipt] = []
            witness = OutputSnapshot(self._tracker)
            measure = None if measuring is None else measuring()
            for step in steps:
                try:
                    receipts.append(step())
                except SurgeryError as error:  # noqa: PERF203
                    if each:
                        raise SurgeryError(f"{operation}: {error}") from error
                    skipped = [*skipped, str(error)]
            if not receipts:
                raise SurgeryError(f"{operation}: nothing of it can be done ({skipped[-1]}).")
            difference = witness.difference()
            whole.receipt = merge_receipts(
                operation, receipts, difference, skipped, dry_run=dry_run
            )
            if measure is not None:
                whole.receipt = with_loss(whole.receipt, *measure())
            return whole.receipt

    def places(self, neurons: Neurons) -> list[tuple[str, int]]:
        """(layer, local index) of neurons given by ids, or as {layer: ids or local indices}."""
        current = self._tracker.current
        places: list[tuple[str, int]] = []
        if isinstance(neurons, Mapping):
            for layer, listed in names_in(self._tracker.current.model, neurons).items():
                places += [(layer, self._slot(layer, one)) for one in _several(listed)]
            return places
        for neuron in _several(neurons):
            entry, index = self._tracker.registry.find(neuron)
            if current.layers.get(entry.layer) is not entry:
                raise UnknownNeuronError(
                    f"Neuron {neuron} belongs to the model {entry.model!r}, not to {current.name!r}."
                )
            places.append((entry.layer, index))
        return places

    def _slot(self, layer: str, neuron: object) -> int:
        """The local index that is meant by an id of the layer, or by a local index."""
        current = self._tracker.current
        ids = current.layers[layer_named(list(current.layers), layer)]
        if isinstance(neuron, NeuronId):
            entry, index = self._tracker.registry.find(neuron)
            if entry is not ids:
                raise UnknownNeuronError(
                    f"Neuron {neuron} belongs to layer {entry.layer!r} of {entry.model!r}, not to {layer!r}."
                )
            return index
        size = len(ids.ids)
        try:
            index = operator.index(neuron)  # type: ignore[arg-type]
        except TypeError:
            index = -1
        if isinstance(neuron, bool) or not 0 <= index < size:
            raise UnknownNeuronError(
                f"Layer {layer!r} has no neuron {neuron!r}: its local indices are 0 to {size - 1}."
            )
        return index


def _not_attached(plan: Plan, model: nn.Module, optimizers: Sequence[Any]) -> list[str]:
    """What to tell of optimizers that train what is about to change, and do not know it."""
    held = dict(model.named_parameters(remove_duplicate=False))
    touched = [held[name] for name in plan.touched if name in held]
    return [
        f"this {kind} holds parameters that changed and is not attached: its next step is refused, as its state is of "
        "the old shapes. Call attach_optimizer(optimizer) before changes"
        for kind in unattached(touched, map(torch_optimizer, optimizers))
    ]


def _several(neurons: object) -> list[Any]:
    """The entries of what should be a list of neurons.

    Raises:
        UnknownNeuronError: It is none.
    """
    try:
        if isinstance(neurons, str | bytes | nn.Module):
            raise TypeError
        return list(neurons)  # type: ignore[call-overload, no-any-return]
    except (TypeError, RuntimeError):
        raise UnknownNeuronError(
            "Neurons are named by a list of ids, or as {layer: [ids or local indices]}, not by "
            f"{type(neurons).__name__} {str(neurons)[:80]!r}."
        ) from None

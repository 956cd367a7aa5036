"""What every change goes through: one transaction on all that is attached, in the journal, alike on all ranks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tracker.adviser import NeuronAdviser
from tracker.checks import checked, fits, shown
from tracker.distributed import Meeting, Ranks, refuse_alone, watch_wrapper
from tracker.errors import StructureError, SurgeryError, TrackerError, UnknownNeuronError
from tracker.identity import NeuronId, layer_named
from tracker.journal import Journal, fingerprint
from tracker.probe import Arguments, quiet_copy
from tracker.session import Session, rehearsing
from tracker.structure import Structure
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.attachments import follower_of, holds, torch_optimizer
from tracker.surgery.latency import PASSES, latency
from tracker.surgery.newborn import watch
from tracker.surgery.plan import Plan
from tracker.surgery.receipt import joined, taken_back
from tracker.surgery.stale import unattached
from tracker.surgery.transaction import Witness, carry_out, count, refuse_inside_a_pass

Neurons = Iterable[int] | Mapping[str, Sequence[int]]


MOST_PASSES = 100_000


@checked(SurgeryError, itself=("passes",))
class NeuronChanger(NeuronAdviser):
    """Attached optimizers, followers and processes; journal; undo. The changes themselves are `NeuronSurgeon`'s."""

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together: traced when first asked; the model is not changed.

        Raises:
            StructureError: The model has not run yet and no example inputs were given, or it cannot be traced.
        """
        self._require_known(self._session, StructureError)
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
        if not fits(passes, int) or not 1 <= passes <= MOST_PASSES:
            raise SurgeryError(
                f"Latency is measured in 1 or more passes (at most {MOST_PASSES:,}), not in {shown(passes)}."
            )
        _ = self.structure  # tells what is missing
        entry = self._tracker.current
        assert entry.observer.inputs is not None
        return latency(quiet_copy(entry.model()), Arguments(*entry.observer.inputs), passes)

    def attach_optimizer(self, *optimizers: Any) -> None:
        """Have the state of these optimizers move with every change of the tracked models whose parameters they hold.

        Raises:
            SurgeryError: One is no optimizer, or holds no parameter of a tracked model; none was attached.
        """
        sessions = [self._session_of(entry) for entry in self._tracker.living()]
        owners = []
        for optimizer in optimizers:
            plain = torch_optimizer(optimizer)
            mine = [s for s in sessions if holds(plain, s.models())]
            if not mine:
                names = ", ".join(repr(s.entry.name) for s in sessions) or "none"
                raise SurgeryError(
                    f"This {type(plain).__name__} holds no parameter of a tracked model ({names}): its state could not "
                    "move with a change. Call track_model(model) first, and build the optimizer over that model's "
                    "parameters."
                )
            owners.append(mine)
        for optimizer, mine in zip(optimizers, owners, strict=True):
            for session in mine:
                if not any(o is optimizer for o in session.optimizers):
                    session.optimizers.append(optimizer)
            watch(
                torch_optimizer(optimizer)
            )  # a state that is loaded may be that of a model that grew

    def detach_optimizer(self, *optimizers: Any) -> None:
        """Let go of these optimizers: changes leave their state as it is.

        Raises:
            SurgeryError: One is not attached; none was detached.
        """
        sessions = list(self._sessions.values())
        for optimizer in optimizers:
            if not any(o is optimizer for s in sessions for o in s.optimizers):
                raise SurgeryError(f"This {type(optimizer).__name__} is not attached.")
        for session in sessions:
            session.optimizers = [
                o for o in session.optimizers if not any(o is gone for gone in optimizers)
            ]

    def attach_process_group(self, group: Any = None) -> None:
        """Change the current model's replicas on all ranks of a group (None: all processes) alike, or none of them.

        From here on every change, `calibrate` and `merge_statistics` are collectives: all ranks call them in the same
        order. The plan's numbers are the first rank's. After a change, a DistributedDataParallel wrapper is to be
        made anew: `model = tracker.renew(model)`.

        Raises:
            SurgeryError: torch.distributed is not initialised.
            VerificationError: The replicas, or the states of their attached optimizers, are not the same.
        """
        ranks, session = Ranks(group), self._session
        ranks.require_same_model(session.entry.model(), session.optimizers)
        session.ranks = ranks
        model = session.entry.model()
        if not any(isinstance(hook, Meeting) for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(Meeting(), prepend=True)

    def merge_statistics(self) -> None:
        """End the window, and give each rank the statistics of all; the next begins with `start_tracking`.

        Raises:
            SurgeryError: `attach_process_group` was not called.
        """
        session = self._session
        if session.ranks is None:
            raise SurgeryError("There are no ranks to merge: call attach_process_group first.")
        observer = session.entry.observer
        self.stop_tracking()
        if session.merged != observer.version:
            session.ranks.merge_windows(observer)
            session.merged = observer.version

    def _met(self, model: nn.Module, session: Session) -> None:
        watch_wrapper(model)
        known = [o for other in self._sessions.values() for o in other.optimizers]
        for optimizer in known:  # of another model, and of this one too
            mine = any(o is optimizer for o in session.optimizers)
            if not mine and holds(torch_optimizer(optimizer), session.models()):
                session.optimizers.append(optimizer)

    def attach_follower(self, *models: nn.Module) -> None:
        """Have these copies of the current model (an EMA, say) change alike.

        Raises:
            SurgeryError: One is no copy of the current model; none was attached.
        """
        session = self._session
        for follower in models:
            follower_of(session.entry.model(), follower)
        session.followers += [m for m in models if not any(m is f for f in session.followers)]

    def detach_follower(self, *models: nn.Module) -> None:
        """Let go of these copies of the current model: changes leave them as they are.

        Raises:
            SurgeryError: One does not follow it; none was detached.
        """
        session = self._session
        for model in models:
            if not any(model is f for f in session.followers):
                raise SurgeryError(
                    f"This {type(model).__name__} does not follow {session.entry.name!r}."
                )
        session.followers = [f for f in session.followers if not any(f is m for m in models)]

    @property
    def journal(self) -> Journal:
        """Every change of the current model so far, in order."""
        return self._session.journal if self._tracker.models else Journal()

    def undo(self) -> Receipt:
        """Take the current model's last change back, bit for bit: gradients, optimizer state, ids, statistics too.

        Returns:
            The receipt of the way back: ids that come again in `added_ids`, those of neurons that were added in
            `removed_ids`.

        Raises:
            SurgeryError: There is no change of it to take back.
        """
        session = self._session
        change = session.last
        if change is None or change.receipt is None:
            raise SurgeryError(
                f"There is no change to undo of {session.entry.name!r}: only its last one can be taken back."
            )
        self._require_known(session)
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

    def _together(self, what: str) -> AbstractContextManager[None]:
        ranks = self._session.ranks
        return nullcontext() if ranks is None else ranks.together(what)

    def _change(
        self,
        plan: Callable[[], tuple[Plan, list[str]]],
        *,
        dry_run: bool,
        verify: bool,
        skipped: Sequence[str] = (),
    ) -> Receipt:
        """One change. `skipped`: What was asked and is not done; `plan` may fill it."""
        session = self._session
        model, ranks = session.entry.model(), session.ranks
        # What is made inside the caller's inference mode could not be written.
        with torch.inference_mode(False), session.transaction() as change:
            with self._together("A change"):
                refuse_inside_a_pass(self._tracker)
                self._require_known(session)
                before = fingerprint(model)
                drawn, notes = plan()
                if not (dry_run or session.tried):
                    refuse_alone(ranks)
            if ranks is not None:
                ranks.agree(drawn)
            optimizers, followers = session.attached()
            if not (dry_run or session.tried):
                notes = [*notes, *_not_attached(drawn, model, optimizers)]
            with self._together("A change"):
                change.receipt, _ = carry_out(
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
        return change.receipt

    def _note(
        self, plan: Plan, receipt: Receipt, fingerprints: tuple[str, str], log: UndoLog
    ) -> None:
        session = self._session
        session.know(log)
        session.note(plan, receipt, fingerprints, log)
        for other in () if session.tried else session.others():
            other.take_in(plan, receipt, fingerprints, log)

    def _require_known(self, session: Session, error: type[TrackerError] = SurgeryError) -> None:
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

    def _change_all(
        self,
        operation: str,
        steps: Sequence[Callable[[], Receipt]],
        skipped: Sequence[str],
        *,
        dry_run: bool,
        each: bool = False,
    ) -> Receipt:
        """Several changes as one, undone together. What is refused of them is skipped or, with `each`, refuses all."""
        if not steps:
            why = "; ".join(skipped[:3]) or "they name nothing"
            raise SurgeryError(f"{operation}: there is nothing to do ({why}).")
        with self._rehearsal() if dry_run else nullcontext(), self._session.transaction() as whole:
            receipts: list[Receipt] = []
            witness = Witness(self._tracker)
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
            whole.receipt = joined(operation, receipts, difference, skipped, dry_run=dry_run)
        return whole.receipt

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Inside, the current model is a copy of what it is now, with a state of its own: for what is only tried."""
        session = self._session
        with rehearsing(self._tracker) as entry:
            self._sessions[entry] = Session(
                self._tracker,
                entry,
                session.history,
                ranks=session.ranks,
                calibration=session.calibration,
                tried=True,
            )
            try:
                yield
            finally:
                del self._sessions[entry]

    def _places(self, neurons: Neurons) -> list[tuple[str, int]]:
        """(layer, local index) of neurons given by ids, or as {layer: ids or local indices}."""
        current = self._tracker.current
        places: list[tuple[str, int]] = []
        if isinstance(neurons, Mapping):
            for layer, listed in neurons.items():
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
        return list(neurons)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):
        raise UnknownNeuronError(
            "Neurons are named by a list of ids, or as {layer: [ids or local indices]}, not by "
            f"{type(neurons).__name__} {str(neurons)[:80]!r}."
        ) from None

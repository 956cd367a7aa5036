"""The part of an engine that trains: runs of a policy, in which a model changes itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tracker.distributed.ranks import refuse_alone
from tracker.errors import SurgeryError
from tracker.parts.session import Session
from tracker.parts.sessions import Sessions
from tracker.parts.surgeon import Surgeon
from tracker.surgery import Receipt
from tracker.tracker import ActivationTracker
from tracker.training import Decision, Phases, Policy, SelfModification, as_policy


class Trainer:
    """Starts, steps and stops the runs of an engine's models.

    Args:
        tracker: Holds the models.
        sessions: Where the run of each is kept.
        surgeon: Carries out what policies decide.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions, surgeon: Surgeon) -> None:
        self._tracker = tracker
        self._sessions = sessions
        self._surgeon = surgeon

    @property
    def run(self) -> SelfModification | None:
        """The run of the current model."""
        session = self._sessions.present
        found: SelfModification | None = None if session is None else session.run
        return found

    def start_self_modification(self, policy: Any = None, steps: int | None = None) -> None:
        """Let the current model change itself while it trains, as the policy says; call `step` after each step.

        Between looks nothing is observed. Model, optimizer and scheduler stay the same objects. After the load of a
        state dict that carries a run (see `carry_journal`), that run goes on.

        Args:
            policy: A Policy, Phases, a function or an object with `decide` (see `Policy.of`); None for the default one,
                or that of the run that goes on.
            steps: Of the whole run, where they are known: a schedule that the policy leaves at its defaults becomes
                shares of them, and the last quarter is left in peace; see `Policy.over`.

        Raises:
            SurgeryError: `policy` is none of these, or protects what is not there; the run is too short to change in.
            CheckpointError: The run that was loaded is not one of this model.

        Examples:
            >>> from tracker import Policy
            >>> engine.start_self_modification(Policy(max_parameters=80, recycle=True), steps=2_000)
            >>> engine.life[0].why
            'the beginning'
        """
        session = self._sessions.current
        carried = session.waiting
        chosen = _policy(policy, carried)
        if steps is not None and (policy is not None or carried is None):
            chosen = chosen.fitted(steps)
        refuse_alone(session.ranks)
        self.begin(chosen)

    def begin(self, policy: Policy | Phases) -> None:
        """Begin the run of a policy, or go on with the one that was loaded; the first step looks for other processes.

        Args:
            policy: That decides.

        Raises:
            SurgeryError: It protects what is not there.
            CheckpointError: The run that was loaded is not one of this model.
        """
        session = self._sessions.current
        carried = session.waiting
        run = SelfModification(self._tracker, session, self._surgeon, policy)
        if carried is not None:
            carried.resume(session, run)
        if session.run is not None:
            session.run.stop()
        session.run, session.waiting = run, None
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

        Examples:
            >>> engine.start_self_modification()
            >>> loss = nn.functional.cross_entropy(model(x), y)
            >>> loss.backward()
            >>> optimizer.step()
            >>> engine.step(loss) is None  # no change at this step
            True
        """
        session = self._that_runs(model)
        if session is None:
            return None
        if not session.run.stopped:
            refuse_alone(session.ranks)
        with self._tracker.speaking_of(session.entry):
            receipt: Receipt | None = session.run.step(loss)
            return receipt

    def stop_self_modification(self) -> None:
        """Have no model change itself any more; `life` stays.

        Examples:
            >>> engine.start_self_modification()
            >>> engine.stop_self_modification()
            >>> engine.step(0.5) is None
            True
        """
        for session in self._sessions:
            if session.run is not None:
                session.run.stop()

    def get_neuron_ages(self) -> dict[str, dict[int, int]]:
        """{layer name: {neuron id: steps since it came}}; of those that were there before, steps of the run.

        Raises:
            SurgeryError: The current model does not modify itself.

        Examples:
            >>> engine.start_self_modification()
            >>> _ = engine.step(0.5)
            >>> engine.get_neuron_ages()["2"][8]
            1
        """
        run = self.run
        if run is None:
            raise SurgeryError(
                "Neurons have no age in steps: nothing counts them. Call start_self_modification first."
            )
        return run.ages()

    @property
    def life(self) -> list[Decision]:
        """What was decided so far, and why: changes, refusals, and looks at which nothing was to be done.

        Of the current model, or of the one model that modified itself.
        """
        runs = [s.run for s in self._sessions if s.run is not None]
        run = self.run or (runs[0] if len(runs) == 1 else None)
        return [] if run is None else copy.deepcopy(run.life)

    def _that_runs(self, model: nn.Module | None) -> Session | None:
        """The session whose run takes a step; None where nothing modifies itself."""
        if model is not None:
            running = [self._sessions.of(self._tracker.tracked(model))]
        else:
            running = [s for s in self._sessions if s.run is not None]
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


def _policy(policy: object, carried: Any) -> Policy | Phases:
    """What was given, else what a run that goes on has, else the default one."""
    if policy is not None:
        return as_policy(policy)
    return Policy() if carried is None else Policy.from_dict(carried.policy)

"""The loop: counts steps, observes before it looks, has the policy decide, measures what came of it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.errors import SurgeryError, TrackerError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.observation.neuron_ids import named
from tracker.parts.session import Session
from tracker.surgery import Receipt
from tracker.surgery.inserted_modules import inserted_layers
from tracker.surgery.prices.flops import flops_by_weight
from tracker.surgery.prices.latency import latency
from tracker.surgery.prices.protection import Protection, protection
from tracker.surgery.transaction import count
from tracker.tracker import ActivationTracker
from tracker.training.candidates import CostModel, Wanted, bypasses, candidates
from tracker.training.carry_out import Limits, carry_out
from tracker.training.choices import Requests, Size
from tracker.training.custom_policies import taken_by
from tracker.training.decisions import DONE, Decision, decision_of
from tracker.training.learning import falling
from tracker.training.observation_phase import ObservationPhase
from tracker.training.policy import Phases, Policy
from tracker.training.seen import CollectedSignals
from tracker.training.sensitivity import RecordedPass, losses_of, with_curvature
from tracker.training.verdict import Verdict, rise_by, standard_error

if TYPE_CHECKING:
    from tracker.parts.surgeon import Surgeon

POINTS = 8  # of the loss curve, from one look to the next


class SelfModification:
    """One run of a policy on one model.

    Args:
        tracker: Holds the model, which is the current one at each step.
        session: What is kept of the model.
        surgeon: Carries out what is decided.
        policy: Decides.
    """

    def __init__(
        self,
        tracker: ActivationTracker,
        session: Session,
        surgeon: Surgeon,
        policy: Policy | Phases,
    ) -> None:
        self.policy, self.life = policy, list[Decision]()
        self.steps = 0
        self.losses: list[tuple[int, float]] = []  # (step, mean loss since the last entry)
        self.accuracies: list[tuple[int, float]] = []  # (step, as logged)
        self._tracker, self._session, self._surgeon = tracker, session, surgeon
        self._recent: list[Tensor] = []
        self._means: list[float] = []  # before each look
        self._blocked: dict[str, int] = {}
        self._watch: ObservationPhase | None = None
        self._sizes: dict[
            str, int
        ] = {}  # of each group, when it was first seen: shares are of these
        self._seen = CollectedSignals()  # in the last look, beside what consumers read
        self._open: Verdict | None = None  # of the last change
        # Passes that it is judged on, and their losses before it.
        self._measured: tuple[tuple[RecordedPass, ...], Tensor | None] = (), None
        self._begun = len(session.journal)  # entries before this run
        # Of which the life tells; None: of all that there are at the next step.
        self._entries: int | None = self._begun
        self._counted: tuple[int, tuple[dict[str, float], float]] | None = None
        self._stopped = False
        # What `dump_state` gives once it is stopped in the middle of a look.
        self._parting: tuple[dict[str, Any], dict[str, ConsumerInput], dict[str, Tensor]] | None = (
            None
        )
        self._interrupted = False  # the model changed during a look, which begins anew
        for part in policy.policies():  # a name that matches nothing is told now
            if part.protect and self._session.entry.observer.calls:
                protection(tracker, part.protect)
        self._note("kept", "the beginning", float("nan"))

    @property
    def model(self) -> nn.Module:
        """The model that changes itself. It is not kept alive."""
        return self._session.entry.model()

    @property
    def stopped(self) -> bool:
        """Whether it does nothing any more."""
        return self._stopped

    def step(self, loss: Tensor | float) -> Receipt | None:
        """After each optimizer step; the receipt of what was changed or taken back just now, if anything was."""
        if self._stopped:
            return None
        start, policy = self.policy.at(self.steps)
        self._note_by_hand()
        self._recent.append(_number(loss))
        self.steps += 1
        since = self.steps - start - policy.warm_up
        phase = since % policy.every
        stretch = max(policy.every // POINTS, 1)
        if self.steps % stretch == 0:
            self.losses.append((self.steps, self._mean(stretch)))
        taken_back = None
        if self._open is not None and self.steps >= self._open.step + policy.settle:
            taken_back = self._judge()
        if since >= 0 and phase == 0:
            try:
                return self._look(policy) or taken_back
            finally:
                self._seen = CollectedSignals()  # it holds inputs of the model
        begins = since >= -policy.look and phase == policy.every - policy.look
        left = policy.every - phase  # steps to the look's decision
        over = policy.until is not None and self.steps - start + left > policy.until
        if (begins or self._interrupted) and not over:
            self._begin_to_observe()
        return taken_back

    def dump_state(self) -> tuple[dict[str, Any], dict[str, ConsumerInput], dict[str, Tensor]]:
        """Where the run is, as plain data, and what it observed since it began to look: reads, and other tensors.

        A change that awaits its verdict is not among it; see `verdict`.
        """
        if self._parting is not None:
            return self._parting
        self._note_by_hand()
        data = {
            "policy": self.policy.to_dict(),
            "steps": self.steps,
            "losses": [list(pair) for pair in self.losses],
            "accuracies": [list(pair) for pair in self.accuracies],
            "recent": [float(loss) for loss in self._recent],
            "means": list(self._means),
            "blocked": dict(self._blocked),
            "sizes": dict(self._sizes),
            "life": [asdict(decision) for decision in self.life],
            "observes": self._watch is not None or self._interrupted,
            "interrupted": self._interrupted,
            "begun": self._begun,
        }
        if self._watch is None:
            return data, {}, {}
        tables, data["inputs"] = self._watch.seen.dump_state()
        return data, self._watch.reads(), tables

    def restore_state(
        self,
        data: Mapping[str, Any],
        seen: Mapping[str, ConsumerInput],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Go on where `dump_state` was called.

        Raises:
            KeyError, TypeError, ValueError: It is nothing that `dump_state` gave.
        """
        life = [decision_of(decision) for decision in data["life"]]
        self.steps = operator.index(data["steps"])
        self.losses = [(operator.index(step), float(loss)) for step, loss in data["losses"]]
        self.accuracies = [(operator.index(n), float(a)) for n, a in data["accuracies"]]
        self._recent = [torch.tensor(float(loss)) for loss in data["recent"]]
        self._means = [float(mean) for mean in data["means"]]
        self._blocked = {str(n): operator.index(looks) for n, looks in data["blocked"].items()}
        self._sizes = {str(n): operator.index(k) for n, k in data.get("sizes", {}).items()}
        self._begun = operator.index(data.get("begun", 0))
        self.life[:], self._entries = life, None
        no_inputs = not self._session.entry.observer.calls  # they were no plain data
        if data["observes"] and (no_inputs or data.get("interrupted", False)):
            self._interrupted = True
        elif data["observes"]:
            self._begin_to_observe()
            assert self._watch is not None
            self._watch.restore_state(seen, tables, data.get("inputs"))

    @property
    def verdict(self) -> Verdict | None:
        """The change that awaits its verdict, as long as it can be taken back."""
        waits = self._open
        change = None if waits is None or waits.change is None else waits.change()
        return waits if change is not None and self._session.last is change else None

    def await_verdict(self, verdict: Verdict) -> None:
        """Judge a change that was made before this run was loaded."""
        self._open = verdict

    def stop(self) -> None:
        """Observe and change nothing any more."""
        if self._watch is not None and self._session.carries_run:
            self._parting = self.dump_state()
        self._stopped = True
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def interrupt(self) -> None:
        """The model was changed by someone else: what a look saw so far is of another network."""
        if self._watch is not None:
            self._watch.stop()
            self._watch, self._interrupted = None, True

    def _begin_to_observe(self) -> None:
        self._interrupted = False
        # The policy that will decide, which is the one that holds at this step.
        _, policy = self.policy.at(self.steps)
        self._watch = ObservationPhase(self._tracker, policy)

    def _look(self, policy: Policy) -> Receipt | None:
        self._interrupted = False
        if self._watch is None:
            return None
        tracker = self._tracker
        reads, ranks, look = self._watch.stop(), self._session.ranks, self._watch
        self._seen, self._watch = look.seen, None
        if ranks is not None:
            reads = ranks.merge_reads(reads)
            self._seen.products = ranks.sums(self._seen.products)
            self._seen.bent = ranks.sums(self._seen.bent)
            self._seen.sizes = ranks.sums(self._seen.sizes)
            self._seen.facts = ranks.sums({"facts": self._seen.facts})["facts"]
        tracker.current.reads = with_curvature(
            reads, look.wanted, self._seen.bent, self._seen.facts, self._mean(policy.look)
        )
        lately, spread = self._mean(policy.settle), self._error(policy.settle)
        loss, fall = self._mean(), self._falling(policy)
        self._recent = []
        self._means.append(loss)
        self._blocked = {name: n - 1 for name, n in self._blocked.items() if n > 1}
        wanted, entries = self._decided(policy, lately, fall), len(self._session.journal)
        if not wanted.groups:
            self._note("kept", wanted.why, loss)
            return None
        # What comes, or gets a new start where nothing was said, changes no output.
        may_hurt = wanted.remove or wanted.merge or wanted.drop or policy.dormant
        regrets = policy.regret < float("inf")
        witnesses = look.witnesses if ranks is None and may_hurt and regrets else ()
        measured = losses_of(witnesses, self.model)
        try:
            receipt = self._do(wanted, policy)
        except TrackerError as error:
            for name in wanted.groups:
                self._blocked[name] = policy.patience
            self._note("refused", str(error), loss)
            return None
        # What undo would need is as much as the model and its optimizer.
        change = self._session.last = self._session.last if regrets else None
        held = None if change is None else weakref.ref(change)  # it holds the model
        exact = receipt.promise == "exact"  # the function is what it was
        rise = 0.0 if exact else rise_by(measured, losses_of(witnesses, self.model))
        self._open = Verdict(self.steps, lately, wanted.groups, held, entries, spread, rise)
        self._measured = witnesses, measured
        self._note(DONE[receipt.operation], wanted.why, loss)
        return receipt

    def _decided(self, policy: Policy, loss: float, fall: float) -> Requests:
        """What the policy wants; of several ranks, what the first one's wants."""
        tracker, ranks = self._tracker, self._session.ranks
        wanted = Requests("the first rank decides")
        with nullcontext() if ranks is None else ranks.together("A look"):
            if ranks is None or ranks.rank == 0:
                inputs = tracker.current.observer.inputs
                assert inputs is not None  # there is a structure
                by_weight, flops = self._flops(Arguments(*inputs))
                time = 0.0
                if policy.times:
                    time = latency(copy_without_hooks(self.model), Arguments(*inputs))
                now = Size(count(self.model), flops, time)
                price = CostModel(by_weight, time / max(flops, 1.0))
                able = candidates(
                    self._tracker,
                    policy,
                    price,
                    self._surgeon.correlation_threshold,
                    self._spared(policy),
                    self._seen,
                    loss,
                    _wanted(policy, now),
                    [name for name, looks in self._blocked.items() if looks],
                )
                more: dict[str, Any] = {
                    "inserted": inserted_layers(self.model),
                    "step": self.steps,
                    "looks_left": self._looks_left(policy),
                    "falling": fall,
                }
                more = taken_by(policy.decide, more)  # of a subclass, what it knows
                decide = partial(policy.decide, able, now, self._means, self._blocked, **more)
                wanted = decide()
                if policy.drop and not (wanted.remove or wanted.merge or wanted.recycle):
                    wanted = decide(
                        bypasses=[
                            b
                            for b in bypasses(
                                tracker, able, self._seen.inputs, price, policy.protect
                            )
                            if not self._is_new(b.name, policy)
                        ]
                    )
        return wanted if ranks is None else Requests(**ranks.broadcast_value(asdict(wanted)))

    def _looks_left(self, policy: Policy) -> int | None:
        """That follow this one."""
        if policy.until is None:
            return None
        start, _ = self.policy.at(self.steps - 1)
        return max(policy.until - (self.steps - start), 0) // policy.every

    def _flops(self, inputs: Arguments) -> tuple[dict[str, float], float]:
        """FLOPs by weight, and in all; counted anew once it changed."""
        version = self._session.entry.observer.version
        known = self._counted
        if known is None or known[0] != version:
            by_weight, other = flops_by_weight(copy_without_hooks(self.model), inputs)
            self._counted = known = version, (by_weight, sum(by_weight.values()) + other)
        return known[1]

    def _protected(self, policy: Policy) -> Protection:
        """What the policy leaves alone, whatever it decides."""
        tracker = self._tracker
        for group in tracker.structure().groups:
            self._sizes.setdefault(group.name, group.size)
        return protection(tracker, policy.protect, self._sizes, strict=False)

    @property
    def born(self) -> dict[int, int]:
        """The step after which each neuron came, by id, of those that came during this run."""
        entries = list(self._session.journal)[self._begun :]
        return {
            i: entry.step for entry in entries if entry.step is not None for i in entry.added_ids
        }

    def ages(self) -> dict[str, dict[int, int]]:
        """{layer name: {neuron id: steps since it came}}; of those that were there before, steps of the run."""
        born, layers = self.born, self._session.entry.layers
        return {
            name: dict(
                zip(named(ids.ids), [self.steps - born.get(i, 0) for i in ids.ids], strict=True)
            )
            for name, ids in layers.items()
        }

    def _young(self, policy: Policy) -> set[int]:
        """Neurons that came so lately that they are left alone."""
        last = self.steps - policy.newborn * policy.every
        return {i for i, step in self.born.items() if step >= last} if policy.newborn else set()

    def _spared(self, policy: Policy) -> Protection:
        """What neither goes nor gets a new start now: what is protected, and what came lately."""
        return self._protected(policy).sparing(self._tracker.structure(), self._young(policy))

    def _is_new(self, module: str, policy: Policy) -> bool:
        """Whether all neurons of a layer or block came lately."""
        layers = self._tracker.current.layers.items()
        ids = {i for n, layer in layers if f"{n}.".startswith(f"{module}.") for i in layer.ids}
        return bool(ids) and ids <= self._young(policy)

    def _do(self, wanted: Requests, policy: Policy) -> Receipt:
        limits = Limits(policy.protect, self._protected(policy), self._spared(policy))
        return carry_out(wanted, self._surgeon, self._tracker, limits, self._seen, self.steps)

    def _judge(self) -> Receipt | None:
        """Whether the last change kept what it promised; if not, it is taken back with the steps since."""
        assert self._open is not None
        verdict, self._open = self._open, None
        held = verdict.change
        _, policy = self.policy.at(self.steps - 1)
        window = max(policy.settle // 2, 1)
        after, change = self._mean(window), None if held is None else held()
        witnesses, before = self._measured
        now = rise_by(before, losses_of(witnesses, self.model)) if verdict.rise else None
        self._measured = (), None  # they hold inputs of the model
        hurt = verdict.hurt(after, self._error(window), policy.regret, now)
        if not hurt or change is None or self._session.last is not change:
            return None  # it kept what it promised, or something else was changed since
        receipt = self._surgeon.undo()
        for name in verdict.groups:
            self._blocked[name] = policy.patience
        self._note("undone", f"the loss rose from {verdict.loss:.4f} to {after:.4f}", after)
        return receipt

    def _mean(self, last: int | None = None) -> float:
        """Mean loss, over all ranks, of the last steps since the last look; one read for all of them."""
        taken = self._recent if last is None else self._recent[-last:]
        mean, ranks = (
            float(torch.stack(taken).mean()) if taken else float("nan"),
            self._session.ranks,
        )
        return mean if ranks is None else ranks.mean(mean)

    def _error(self, last: int) -> float:
        """Standard error of the mean of the last steps; of several ranks theirs in the mean, which is more."""
        ranks = self._session.ranks
        own = standard_error(torch.stack(self._recent[-last:])) if self._recent else 0.0
        return own if ranks is None else ranks.mean(own)

    def _falling(self, policy: Policy) -> float:
        """What training lowers the loss by from look to look; of several ranks that of their mean loss."""
        ranks = self._session.ranks
        losses = torch.stack(self._recent) if self._recent else torch.zeros(0)
        return falling(losses if ranks is None else ranks.means(losses), policy.every)

    def _note_by_hand(self) -> None:
        """What was changed since the last step, and not by the policy."""
        journal = self._session.journal
        known = self._entries = len(journal) if self._entries is None else self._entries
        if len(journal) > known:
            self._note(DONE.get(journal[-1].operation, "changed"), "by hand", float("nan"))
        elif len(journal) < known:
            self._note("undone", "by hand", float("nan"))

    def _note(self, what: str, why: str, loss: float) -> None:
        self._entries = len(self._session.journal)
        layers = self._tracker.current.layers
        widths = {name: len(layer.ids) for name, layer in layers.items()}
        self.life.append(Decision(self.steps, what, why, loss, count(self.model), widths))


def _wanted(policy: Policy, now: Size) -> Wanted:
    """What a policy must know of a network of this size."""
    if type(policy).decide is not Policy.decide or policy.over_budget(now):
        return Wanted.ALL
    return Wanted.TRADES if policy.trades else Wanted.TOLERATED


def _number(loss: Tensor | float) -> Tensor:
    try:
        return torch.as_tensor(loss).detach().float().reshape(())
    except (TypeError, ValueError, RuntimeError) as error:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise SurgeryError(
            f"step takes the loss of the step, one number, not {shape}. Pass its mean."
        ) from error

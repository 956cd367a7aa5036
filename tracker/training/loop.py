"""The loop: counts steps, observes before it looks, has the policy decide, measures what came of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.compensation import backward
from tracker.compensation.linear import constant
from tracker.errors import SurgeryError, TrackerError
from tracker.probe import Arguments, quiet_copy
from tracker.reads import Read
from tracker.statistics import Covariance
from tracker.structure import UnitGroup
from tracker.structure.sizes import tensors
from tracker.surgery import Receipt, UndoLog
from tracker.surgery.calibration import Watcher, consumers
from tracker.surgery.compression import Limits, Problem, problems_of
from tracker.surgery.flops import flops_by_weight
from tracker.surgery.transaction import count
from tracker.training.policy import Candidate, Phases, Policy, Requests, Size

if TYPE_CHECKING:
    from tracker.surgeon import NeuronSurgeon

POINTS = 8  # of the loss curve, from one look to the next


@dataclass(frozen=True, slots=True)
class Decision:
    """One entry of a network's life: what was decided at a step, and why."""

    step: int
    what: str  # "pruned", "expanded", "recycled", "kept", "undone", "refused"
    why: str
    loss: float
    parameters: int
    widths: dict[str, int]


class SelfModification:
    """One run of a policy on the current model of a surgeon."""

    def __init__(self, surgeon: NeuronSurgeon, model: nn.Module, policy: Policy | Phases) -> None:
        self.policy, self.life = policy, list[Decision]()
        self.steps = 0
        self.losses: list[tuple[int, float]] = []  # (step, mean loss since the last entry)
        self.accuracies: list[tuple[int, float]] = []  # (step, as logged)
        self._surgeon, self.model = surgeon, model
        self._recent: list[Tensor] = []
        self._means: list[float] = []  # before each look
        self._blocked: dict[str, int] = {}
        self._watch: Watcher | None = None
        # A change that awaits its verdict: step, loss before, groups, and what would take it back.
        self._open: tuple[int, float, tuple[str, ...], UndoLog | None] | None = None
        self._stopped = False
        self._note("kept", "the beginning", float("nan"))

    def step(self, loss: Tensor | float) -> Receipt | None:
        """After each optimizer step; the receipt of what was changed just now, if anything was."""
        if self._stopped:
            return None
        start, policy = self.policy.at(self.steps)
        self._recent.append(_number(loss))
        self.steps += 1
        since = self.steps - start - policy.warm_up
        phase = since % policy.every
        stretch = max(policy.every // POINTS, 1)
        if self.steps % stretch == 0:
            self.losses.append((self.steps, self._mean(stretch)))
        if self._open is not None and self.steps >= self._open[0] + policy.settle:
            self._judge()
        if since >= 0 and phase == 0:
            return self._look(policy)
        if since >= -policy.look and phase == policy.every - policy.look:
            self._begin_to_observe()
        return None

    def gather(self) -> tuple[dict[str, Any], dict[str, Read]]:
        """Where the run is, as plain data, and what it observed since it began to look.

        A change that awaits its verdict is not among it: nothing could take it back later.
        """
        data = {
            "policy": self.policy.to_dict(),
            "steps": self.steps,
            "losses": [list(pair) for pair in self.losses],
            "accuracies": [list(pair) for pair in self.accuracies],
            "recent": [float(loss) for loss in self._recent],
            "means": list(self._means),
            "blocked": dict(self._blocked),
            "life": [asdict(decision) for decision in self.life],
            "observes": self._watch is not None,
        }
        return data, {} if self._watch is None else self._watch.seen()

    def go_on(self, data: Mapping[str, Any], seen: Mapping[str, Covariance]) -> None:
        """Go on where `gather` was called.

        Raises:
            KeyError, TypeError, ValueError: It is nothing that `gather` gave.
        """
        life = [Decision(**decision) for decision in data["life"]]
        self.steps = operator.index(data["steps"])
        self.losses = [(operator.index(step), float(loss)) for step, loss in data["losses"]]
        self.accuracies = [(operator.index(n), float(a)) for n, a in data["accuracies"]]
        self._recent = [torch.tensor(float(loss)) for loss in data["recent"]]
        self._means = [float(mean) for mean in data["means"]]
        self._blocked = {str(n): operator.index(looks) for n, looks in data["blocked"].items()}
        self.life[:] = life
        if data["observes"]:
            self._begin_to_observe()
            assert self._watch is not None
            self._watch.go_on(seen)

    def stop(self) -> None:
        """Observe and change nothing any more."""
        self._stopped = True
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _begin_to_observe(self) -> None:
        groups = [g for g in self._surgeon.structure.groups if g.prunable and g.exact]
        wanted, _ = consumers(self.model, groups)
        self._watch = Watcher(self.model, wanted)

    def _look(self, policy: Policy) -> Receipt | None:
        if self._watch is None:
            return None
        tracker = self._surgeon._tracker
        reads, ranks = self._watch.stop(), self._surgeon._ranks
        tracker.current.reads = reads if ranks is None else ranks.merge_reads(reads)
        self._watch = None
        lately = self._mean(policy.settle)
        loss = self._mean()
        self._recent = []
        self._means.append(loss)
        self._blocked = {name: n - 1 for name, n in self._blocked.items() if n > 1}
        wanted = self._decided(policy)
        if not wanted.groups:
            self._note("kept", wanted.why, loss)
            return None
        try:
            receipt = self._do(wanted)
        except TrackerError as error:
            for name in wanted.groups:
                self._blocked[name] = policy.patience
            self._note("refused", str(error), loss)
            return None
        self._open = (self.steps, lately, wanted.groups, self._surgeon._undo)
        what = "pruned" if wanted.remove else "recycled" if wanted.recycle else "expanded"
        self._note(what, wanted.why, loss)
        return receipt

    def _decided(self, policy: Policy) -> Requests:
        """What the policy wants; of several ranks, what the first one's wants."""
        tracker, ranks = self._surgeon._tracker, self._surgeon._ranks
        wanted = Requests("the first rank decides")
        with nullcontext() if ranks is None else ranks.together("A look"):
            if ranks is None or ranks.rank == 0:
                inputs = tracker.current.observer.inputs
                assert inputs is not None  # there is a structure
                by_weight, other = flops_by_weight(quiet_copy(self.model), Arguments(*inputs))
                now = Size(count(self.model), sum(by_weight.values()) + other)
                candidates = self._candidates(policy, by_weight)
                wanted = policy.decide(candidates, now, self._means, self._blocked)
        return wanted if ranks is None else Requests(**ranks.of_first(asdict(wanted)))

    def _do(self, wanted: Requests) -> Receipt:
        if wanted.remove:
            units = {name: list(gone) for name, gone in wanted.remove.items()}
            return self._surgeon.prune_units(units, compensate=True)
        groups = {g.name: g for g in self._surgeon.structure.groups}
        if wanted.recycle:
            ids = [
                i
                for g, units in wanted.recycle.items()
                for u in units
                for i in groups[g].neuron_ids(u)
            ]
            return self._surgeon.recycle_neurons(ids, seed=self.steps)
        growth = {}
        for name, number in wanted.expand.items():
            layer, own = self._grown(groups[name])
            growth[layer] = number * own
        return self._surgeon.expand_layers(growth, seed=self.steps)

    def _judge(self) -> None:
        """Whether the last change kept what it promised; if not, it is taken back with the steps since."""
        assert self._open is not None
        _, before, names, undo = self._open
        self._open = None
        _, policy = self.policy.at(self.steps - 1)
        after = self._mean(policy.settle // 2)
        if after <= before * (1 + policy.regret) or self._surgeon._undo is not undo:
            return  # it kept what it promised, or something else was changed since
        self._surgeon.undo()
        for name in names:
            self._blocked[name] = policy.patience
        self._note("undone", f"the loss rose from {before:.4f} to {after:.4f}", after)

    def _candidates(self, policy: Policy, by_weight: Mapping[str, float]) -> list[Candidate]:
        """The groups that can shrink by themselves, and what that is predicted to cost."""
        groups, problems, _ = problems_of(self._surgeon._tracker, Limits(floor=policy.floor))
        learnt = {name for name, _ in self.model.named_parameters()}
        held = {name: t.shape for name, t in tensors(self.model).items()}
        found = []
        for group, problem in zip(groups, problems, strict=True):
            selection = backward(
                problem.covariance,
                problem.weight,
                problem.units,
                problem.protected,
                count=problem.count,
                mean=problem.mean,
            )
            errors = (selection.errors / max(selection.total, 1e-300)).tolist()
            parameters = flops = 0.0
            for (name, dim), indices in group.members[0].items():
                share = len(indices) / held[name][dim]
                parameters += share * held[name].numel() if name in learnt else 0.0
                flops += share * by_weight.get(name, 0.0)
            layer, _ = self._grown(group)
            order = tuple(u for u in selection.order if u < group.size)
            cost, dead = Size(parameters, flops), _dead(problem, group.size)
            found.append(Candidate(group.name, layer, group.size, order, tuple(errors), cost, dead))
        return found

    def _grown(self, group: UnitGroup) -> tuple[str, int]:
        """The tracked layer by which a group grows, and how many of its neurons a unit comprises."""
        tracked = self._surgeon._tracker.current.layers
        neurons = [layer for layer, _ in group.neurons(0) if layer in tracked]
        made = [layer for layer in neurons if layer in group.layers] or neurons
        return (made[0], made.count(made[0])) if made else (group.name, 1)

    def _mean(self, last: int | None = None) -> float:
        """Mean loss, over all ranks, of the last steps since the last look; one read for all of them."""
        taken = self._recent if last is None else self._recent[-last:]
        mean, ranks = (
            float(torch.stack(taken).mean()) if taken else float("nan"),
            self._surgeon._ranks,
        )
        return mean if ranks is None else ranks.mean(mean)

    def _note(self, what: str, why: str, loss: float) -> None:
        layers = self._surgeon._tracker.current.layers
        widths = {name: len(layer.ids) for name, layer in layers.items()}
        self.life.append(Decision(self.steps, what, why, loss, count(self.model), widths))


def _dead(problem: Problem, size: int) -> tuple[int, ...]:
    """Units of which every consumer reads a constant."""
    quiet = constant(problem.covariance, problem.mean)
    return tuple(u for u, columns in enumerate(problem.units[:size]) if bool(quiet[columns].all()))


def _number(loss: Tensor | float) -> Tensor:
    try:
        return torch.as_tensor(loss).detach().float().reshape(())
    except (TypeError, ValueError, RuntimeError) as error:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise SurgeryError(
            f"step takes the loss of the step, one number, not {shape}. Pass its mean."
        ) from error

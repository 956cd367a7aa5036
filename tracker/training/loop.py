"""The loop: counts steps, observes before it looks, has the policy decide, measures what came of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.compensation import backward
from tracker.errors import TrackerError
from tracker.statistics import Covariance
from tracker.surgery import Receipt
from tracker.surgery.calibration import Watcher, consumers
from tracker.surgery.compression import Limits, problems_of
from tracker.surgery.transaction import count
from tracker.tracker import Read
from tracker.training.policy import Candidate, Policy, Requests

if TYPE_CHECKING:
    from tracker.surgeon import NeuronSurgeon


@dataclass(frozen=True, slots=True)
class Decision:
    """One entry of a network's life: what was decided at a step, and why."""

    step: int
    what: str  # "pruned", "expanded", "kept", "undone", "refused"
    why: str
    loss: float
    parameters: int
    widths: dict[str, int]


class SelfModification:
    """One run of a policy on the current model of a surgeon."""

    def __init__(self, surgeon: NeuronSurgeon, model: nn.Module, policy: Policy) -> None:
        self.policy, self.life = policy, list[Decision]()
        self.steps = 0
        self.losses: list[tuple[int, float]] = []  # (step, mean loss since the last entry)
        self._surgeon, self.model = surgeon, model
        self._recent: list[Tensor] = []
        self._means: list[float] = []  # before each look
        self._blocked: dict[str, int] = {}
        self._watch: Watcher | None = None
        self._open: tuple[int, float, tuple[str, ...], Callable[[], None]] | None = None
        self._note("kept", "the beginning", float("nan"))

    def step(self, loss: Tensor | float) -> Receipt | None:
        """After each optimizer step; the receipt of what was changed just now, if anything was."""
        policy = self.policy
        self._recent.append(torch.as_tensor(loss).detach().float())
        self.steps += 1
        since = self.steps - policy.warm_up
        phase = since % policy.every
        if self._open is not None and self.steps >= self._open[0] + policy.settle:
            self._judge()
        if since >= 0 and phase == 0:
            return self._look()
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
        self._recent = [torch.tensor(float(loss)) for loss in data["recent"]]
        self._means = [float(mean) for mean in data["means"]]
        self._blocked = {str(n): operator.index(looks) for n, looks in data["blocked"].items()}
        self.life[:] = life
        if data["observes"]:
            self._begin_to_observe()
            assert self._watch is not None
            self._watch.go_on(seen)

    def stop(self) -> None:
        """Observe no more."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _begin_to_observe(self) -> None:
        groups = [g for g in self._surgeon.structure.groups if g.prunable and g.exact]
        wanted, _ = consumers(self.model, groups)
        self._watch = Watcher(self.model, wanted)

    def _look(self) -> Receipt | None:
        if self._watch is None:
            return None
        tracker = self._surgeon._tracker
        tracker.current.reads = self._watch.stop()
        self._watch = None
        lately = self._mean(self.policy.settle)
        loss = self._mean()
        self._means.append(loss)
        self._blocked = {name: n - 1 for name, n in self._blocked.items() if n > 1}
        wanted = self.policy.decide(
            self._candidates(), count(self.model), self._means, self._blocked
        )
        if not wanted.remove and not wanted.expand:
            self._note("kept", wanted.why, loss)
            return None
        try:
            receipt = self._do(wanted)
        except TrackerError as error:
            for name in (*wanted.remove, *wanted.expand):
                self._blocked[name] = self.policy.patience
            self._note("refused", str(error), loss)
            return None
        names = (*wanted.remove, *wanted.expand)
        self._open = (self.steps, lately, names, self._surgeon.undo)
        self._note("pruned" if wanted.remove else "expanded", wanted.why, loss)
        return receipt

    def _do(self, wanted: Requests) -> Receipt:
        if wanted.remove:
            units = {name: list(gone) for name, gone in wanted.remove.items()}
            return self._surgeon.prune_units(units, compensate=True)
        ((layer, number),) = wanted.expand.items()
        return self._surgeon.expand_layer(layer, number, seed=self.steps)

    def _judge(self) -> None:
        """Whether the last change kept what it promised; if not, it is taken back with the steps since."""
        assert self._open is not None
        _, before, names, undo = self._open
        self._open = None
        after = self._mean(self.policy.settle // 2)
        if after <= before * (1 + self.policy.regret):
            return
        try:
            undo()
        except TrackerError:
            return  # something else was changed since
        for name in names:
            self._blocked[name] = self.policy.patience
        self._note("undone", f"the loss rose from {before:.4f} to {after:.4f}", after)

    def _candidates(self) -> list[Candidate]:
        """The groups that can shrink by themselves, and what that is predicted to cost."""
        groups, problems, _ = problems_of(self._surgeon._tracker, Limits(floor=self.policy.floor))
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
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
            cost = 0.0
            for (name, dim), indices in group.members[0].items():
                if name in shapes:
                    size = 1
                    for n in shapes[name]:
                        size *= n
                    cost += size * len(indices) / shapes[name][dim]
            layer = group.layers[0] if group.layers else group.name
            order = tuple(u for u in selection.order if u < group.size)
            found.append(Candidate(group.name, layer, group.size, order, tuple(errors), cost))
        return found

    def _mean(self, last: int | None = None) -> float:
        """Mean loss of the last steps; one read for all of them."""
        taken = self._recent if last is None else self._recent[-last:]
        mean = float(torch.stack(taken).mean()) if taken else float("nan")
        if last is None:
            self._recent = []
            self.losses.append((self.steps, mean))
        return mean

    def _note(self, what: str, why: str, loss: float) -> None:
        layers = self._surgeon._tracker.current.layers
        widths = {name: len(layer.ids) for name, layer in layers.items()}
        self.life.append(Decision(self.steps, what, why, loss, count(self.model), widths))

"""What a policy chooses from: units, pairs, places for a layer, layers to spare; each with its predicted cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from tracker.errors import TrackerError
from tracker.inputs.calls import Arguments
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.modules.kinds import is_linear, kind_of, weight_of
from tracker.modules.layers import known_width
from tracker.structure import UnitGroup
from tracker.structure.code_sizes.attributes import tensors
from tracker.structure.trials.temporary_copies import temporary_copy
from tracker.surgery.apply import apply
from tracker.surgery.inserted_modules import INSERTED, can_follow
from tracker.surgery.operations.depth import plan_layer_removal
from tracker.surgery.operations.merge_pairs import cheapest_pairs
from tracker.surgery.plan import Plan
from tracker.surgery.prices.protection import NOTHING, Protect, Protection, protects
from tracker.surgery.prices.removal_problem import Limits, Problem, problems_of
from tracker.tracker import ActivationTracker
from tracker.training.choices import Bypass, Candidate, Size
from tracker.training.policy import Policy
from tracker.training.seen import NOTHING_SEEN, CollectedSignals
from tracker.training.spending import TRADE
from tracker.utils.nested import tensors_in

DEARER = 10  # tolerances that one group may give up for others


@dataclass(frozen=True, slots=True)
class CostModel:
    """What weights cost. flops: of a forward pass, by weight. time: milliseconds for each FLOP, 0 where none counts."""

    flops: Mapping[str, float]
    time: float

    def size(self, parameters: float, flops: float) -> Size:
        """With the milliseconds that so many FLOPs take."""
        return Size(parameters, flops, flops * self.time)


class Wanted(Enum):
    """How far the errors of units that go are looked for."""

    TOLERATED = "within the tolerance of the policy"
    TRADES = "as far as units elsewhere could gain more"
    ALL = "all that may go"


def candidates(
    tracker: ActivationTracker,
    policy: Policy,
    price: CostModel,
    correlation_threshold: float,
    protected: Protection = NOTHING,
    seen: CollectedSignals = NOTHING_SEEN,
    loss: float = 1.0,
    wanted: Wanted = Wanted.ALL,
    blocked: Collection[str] = (),
) -> list[Candidate]:
    """The groups that can change by themselves, and what that is predicted to cost; those that may.

    seen: What the look saw beside what consumers read. loss: Of the last steps: rises and falls are shares of it.
    wanted: How far errors are looked for. blocked: Groups that are left alone.
    """
    model = tracker.current.model()
    groups, problems, _ = problems_of(tracker, Limits(floor=policy.floor, protected=protected))
    learnt = {name for name, _ in model.named_parameters()}
    held = {name: t.shape for name, t in tensors(model).items()}
    modules = dict(model.named_modules())
    gradients, size = seen.gradients(), abs(loss)
    priced = policy.gradients and problems.priced and 0 < size < float("inf")
    dead = [_dead(problems.constant(i), protected.pinned_of(g)) for i, g in enumerate(groups)]
    gains = [_gains(tracker, policy, g, seen, size) if priced else () for g in groups]
    dormant = [_dormant(policy, seen, group, protected) for group in groups]
    free = [d or m for d, m, g in zip(dead, dormant, groups, strict=True) if g.name not in blocked]
    found = []
    within = policy.tolerance
    if wanted is Wanted.ALL:
        within = float("inf")
    elif policy.recycle and any(free):
        within = -1.0  # these get a new start at this look, and nothing else happens
    elif wanted is Wanted.TRADES:
        most = max(TRADE * sum(g) for g in gains) if gains else 0.0
        within = max(within, min(most, DEARER * within))
    for i, group in enumerate(groups):
        problem = problems[i] if priced else problems.plain(i)
        total = size if priced else max(problem.total, 1e-300)
        most = min(int(policy.at_most * group.size), group.size - policy.floor)
        able = min(group.size - len(protected.pinned_of(group)), group.size - 1)
        most = 0 if within < 0 else min(max(most, 1), able)
        selection = problem.backward(most, within * total)
        parameters = flops = 0.0
        for (name, dim), indices in group.members[0].items():
            share = len(indices) / held[name][dim]
            parameters += share * held[name].numel() if name in learnt else 0.0
            flops += share * price.flops.get(name, 0.0)
        layer, _ = grown(tracker, group)
        pairs, losses = (
            cheapest_pairs(problem, group.size, total, correlation_threshold)
            if policy.merge
            else ((), ())
        )
        found.append(
            Candidate(
                group.name,
                layer,
                group.size,
                tuple(u for u in selection.order if u < group.size),
                tuple((selection.errors / total).tolist()),
                price.size(parameters, flops),
                dead[i],
                pairs,
                losses,
                _deeper(modules.get(layer), layer, price) if policy.insert else None,
                protected.floor(group),
                *_spread(problem, group.size),
                _norm(group, gradients),
                gains[i],
                priced,
                dormant[i],
                problem.total / size if priced else float("inf"),
            )
        )
    return found


def bypasses(
    tracker: ActivationTracker,
    able: Sequence[Candidate],
    inputs: Sequence[Arguments],
    price: CostModel,
    protect: Protect = (),
) -> list[Bypass]:
    """Layers and residual blocks that could go, as half of these inputs say when the other half was fitted."""
    if not inputs:
        return []
    model = tracker.current.model()
    fitted, asked = (inputs, inputs) if len(inputs) == 1 else (inputs[::2], inputs[1::2])
    known = [c.layer for c in able if c.layer in tracker.current.layers]
    linear = [name for name in known if is_linear(model.get_submodule(name))]
    found = []
    for name in [*linear, *_blocks(model, inputs[0])]:
        if protects(tracker, protect, name):
            continue
        try:
            plan, _ = plan_layer_removal(tracker, name, fitted, force=False)
            error = _error(model, plan, asked)
        except TrackerError:
            continue  # it cannot go
        found.append(Bypass(name, error, _saved(model, name, plan, price)))
    return found


def grown(tracker: ActivationTracker, group: UnitGroup) -> tuple[str, int]:
    """The tracked layer by which a group grows, and how many of its neurons a unit comprises."""
    tracked = tracker.current.layers
    neurons = [layer for layer, _ in group.neurons(0) if layer in tracked]
    made = [layer for layer in neurons if layer in group.layers] or neurons
    return (made[0], made.count(made[0])) if made else (group.name, 1)


def neurons_of(tracker: ActivationTracker, group: UnitGroup, unit: int) -> list[int]:
    """Ids of a unit's neurons in the layer by which its group grows."""
    layer, _ = grown(tracker, group)
    ids = tracker.current.layers[layer].ids
    return [ids[i] for name, i in group.neurons(unit) if name == layer]


def _spread(problem: Problem, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and variance of what the consumers read of each unit."""
    mean = problem.mean.tolist() if problem.mean is not None else [0.0] * len(problem.covariance)
    variance = problem.covariance.diagonal().tolist()
    units = problem.units[:size]
    return (
        tuple(sum(mean[c] for c in unit) / max(len(unit), 1) for unit in units),
        tuple(sum(variance[c] for c in unit) for unit in units),
    )


def _norm(group: UnitGroup, gradients: Mapping[str, float]) -> float:
    """Of the gradient by what makes the units; `gradients`: mean squares by parameter."""
    made = {name for (name, _), role in group.roles.items() if role == "produces"}
    result: float = sum(gradients.get(name, 0.0) for name in made) ** 0.5
    return result


def _gains(
    tracker: ActivationTracker,
    policy: Policy,
    group: UnitGroup,
    seen: CollectedSignals,
    loss: float,
) -> tuple[float, ...]:
    """Relative falls of the loss by the next units; none where no room is left for them."""
    if not policy.grow or (policy.ceiling is not None and group.size >= policy.ceiling):
        return ()
    return seen.gains(grown(tracker, group)[0], tracker.current.reads, loss)


def _dead(units: Sequence[int], pinned: Collection[int]) -> tuple[int, ...]:
    return tuple(u for u in units if u not in pinned)


def _dormant(
    policy: Policy, seen: CollectedSignals, group: UnitGroup, protected: Protection
) -> tuple[int, ...]:
    """Units that say little, of those that may get a new start."""
    if not policy.recycle or not policy.dormant:
        return ()
    return _dead(seen.dormant(group, policy.dormant), protected.pinned_of(group))


def _deeper(layer: nn.Module | None, name: str, price: CostModel) -> Size | None:
    """At most what a layer costs that is inserted behind this one: two square ones with biases."""
    if layer is None or not can_follow(layer):
        return None
    width = (known_width(layer) or (0, -1))[0]
    kind = kind_of(layer)
    key = (kind.weight if kind is not None else None) or "weight"
    each = price.flops.get(f"{name}.{key}", 0.0) / weight_of(layer).numel()
    return price.size(2 * width * (width + 1), 2 * each * width * width)


def _blocks(model: nn.Module, inputs: Arguments) -> Iterator[str]:
    """Modules with parts and parameters that give, once in a pass, what has the shape of what they took."""
    trial_copy, calls = copy_without_hooks(model), dict[str, list[bool]]()
    for name, module in trial_copy.named_modules():
        parts = next(module.children(), None) is not None
        if not name or not parts or next(module.parameters(), None) is None:
            continue

        def hook(m: nn.Module, args: object, kwargs: object, out: object, name: str = name) -> None:
            took, gave = tensors_in((args, kwargs)), tensors_in(out)
            same = bool(took and gave) and took[0].shape == gave[0].shape
            calls.setdefault(name, []).append(same)

        module.register_forward_hook(hook, with_kwargs=True)
    forward_once(trial_copy, inputs)
    # A layer with another behind it is none: its name stands for both.
    alone = (n for n, same in calls.items() if same == [True])
    return (n for n in alone if INSERTED not in trial_copy.get_submodule(n)._modules)


def _error(model: nn.Module, plan: Plan, inputs: Sequence[Arguments]) -> float:
    """Σ‖Δy‖² / Σ‖y − mean y‖² of the first tensor of more than one dimension that the model puts out."""
    lost = total = 0.0
    with temporary_copy(model) as trial_copy:
        apply(plan, [trial_copy], [])
        for batch in inputs:
            before, after = (
                _first(forward_once(m, batch))
                for m in (copy_without_hooks(model), copy_without_hooks(trial_copy))
            )
            lost += float((after - before).square().sum())
            total += float((before - before.flatten(0, -2).mean(0)).square().sum())
    error = lost / max(total, 1e-300)
    return error if error == error else float("inf")


def _first(output: object) -> Tensor:
    found = next(t for t in tensors_in(output) if t.ndim > 1 and t.is_floating_point())
    return found.detach().double()


def _saved(model: nn.Module, name: str, plan: Plan, price: CostModel) -> Size:
    """What the removed module has, less what others get."""
    gone = dict(model.get_submodule(name).named_parameters(prefix=name))
    held = tensors(model)
    parameters = float(sum(p.numel() for p in gone.values()))
    flops = sum(price.flops.get(n, 0.0) for n in gone)
    for key, new in plan.fresh.items():
        old = held[key].numel()
        parameters -= new.numel() - old
        flops -= price.flops.get(key, 0.0) * (new.numel() - old) / old
    return price.size(parameters, flops)

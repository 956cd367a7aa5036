"""The methods of one_shot.py that take the same share of every layer: ours, and Torch-Pruning's."""

from __future__ import annotations

from collections.abc import Callable

from _one_shot_cases import Case, Part
from torch import nn

from tracker import NeuronEngine
from tracker.surgery.prices.removal_problem import Limits, chosen_units, problems_of


def ours(
    model: nn.Module, case: Case, part: Part, share: float, compensate: bool, patches: bool = False
) -> None:
    """Uniform shares, greedy OBS in each group."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=case.example)
    engine.calibrate((x for x, _ in case.pairs), patches=patches)
    groups, problems, _ = problems_of(engine.tracker, Limits())
    wanted = set(part.layers(model))
    units = {
        g.name: chosen_units(problems, i, g, round(share * g.size))
        for i, g in enumerate(groups)
        if wanted & set(g.layers)
    }
    engine.prune_units(units, compensate=compensate)


def theirs(model: nn.Module, case: Case, part: Part, share: float, taylor: bool) -> None:
    """Torch-Pruning, uniform shares, as its README drives it."""
    import torch_pruning as tp

    wanted = [model.get_submodule(name) for name in part.layers(model)]
    makers = (nn.Linear, nn.Conv2d, nn.Embedding)
    pruner = tp.pruner.BasePruner(
        model,
        case.example,
        importance=tp.importance.GroupTaylorImportance()
        if taylor
        else tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,  # with 0 it takes no heads either
        ignored_layers=[m for m in model.modules() if isinstance(m, makers) and m not in wanted],
        num_heads=dict.fromkeys(wanted, part.heads) if part.heads else {},
        prune_num_heads=bool(part.heads),
        prune_head_dims=False,
        head_pruning_ratio=share if part.heads else 0.0,
    )
    for x, y in case.pairs if taylor else ():
        case.loss(model, x, y).backward()
    pruner.step()
    model.zero_grad()


PATCHES = "tracker, OBS, compensated, patches"  # of convolutions
METHODS: dict[str, Callable[[nn.Module, Case, Part, float], None]] = {
    "Torch-Pruning, magnitude": lambda m, c, p, s: theirs(m, c, p, s, taylor=False),
    "Torch-Pruning, Taylor": lambda m, c, p, s: theirs(m, c, p, s, taylor=True),
    "tracker, OBS, no compensation": lambda m, c, p, s: ours(m, c, p, s, compensate=False),
    "tracker, OBS, compensated": lambda m, c, p, s: ours(m, c, p, s, compensate=True),
    PATCHES: lambda m, c, p, s: ours(m, c, p, s, compensate=True, patches=True),
}

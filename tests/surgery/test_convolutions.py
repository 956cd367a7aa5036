"""Convolutions: taken over place by place of their kernels, and norms whose statistics are taken anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, SurgeryError


def unfolded(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What lies under the kernel, place by place: (rows, channels · kernel), float64."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
    return patches.transpose(1, 2).flatten(0, 1).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"bias": False},
        {"padding": 2, "dilation": 2},
    ],
    ids=str,
)
def test_patches_give_a_convolution_the_best_there_is(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Against least squares over all that lies under the kernel; channel by channel is never better."""
    torch.manual_seed(0)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 6, 3, **options), nn.Flatten()
        )

    model = build()
    data = [torch.randn(8, 3, 10, 10) for _ in range(4)]
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=data[0][:2])
    optimizer = torch.optim.Adam(model.parameters())
    engine.attach_optimizer(optimizer)
    group = next(g.name for g in engine.structure.groups if "0" in g.layers)
    gone, kept = [2, 5, 6], [0, 1, 3, 4, 7, 8, 9]
    with torch.no_grad():
        read = model[:2](torch.cat(data))
        wanted = model[2](read).double().movedim(1, -1).flatten(0, -2)
    columns = unfolded(model[2], read[:, kept])
    if model[2].bias is not None:
        columns = torch.cat((columns, torch.ones(len(columns), 1).double()), 1)
    best = float((columns @ torch.linalg.lstsq(columns, wanted).solution - wanted).square().mean())

    def error() -> float:
        with torch.no_grad():
            now = model[2](model[:2](torch.cat(data))).double().movedim(1, -1).flatten(0, -2)
        return float((now - wanted).square().mean())

    errors = []
    for patches in (False, True):
        engine.calibrate(data, patches=patches)
        engine.prune_units({group: gone}, compensate=True)
        errors.append(error())
        engine.undo()
    assert errors[1] < errors[0]
    assert errors[1] == pytest.approx(best, rel=2e-3)
    # What was seen goes through a checkpoint, and through a change.
    engine.save_checkpoint(tmp_path / "seen")
    other = build()
    opt = torch.optim.Adam(other.parameters())
    loaded = NeuronEngine.load_checkpoint(tmp_path / "seen", other, opt)
    for e in (engine, loaded):
        e.prune_units({group: gone[:1]}, compensate=True)
        e.prune_units({group: [4, 5]}, compensate=True)
    assert torch.equal(model[2].weight, other[2].weight)
    assert error() == pytest.approx(best, rel=1e-2)
    assert engine.merge_neurons([(0, 1)]).promise == "changed"


def test_norms_are_taken_anew_over_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    data = [torch.randn(16, 3, 8, 8) * (i + 1) + i for i in range(3)]
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=data[0][:2])
    model.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert engine.reestimate_norms(data) == ["1", "4"]
    read = torch.cat([model[0](x).detach().double() for x in data]).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(model[1].running_mean.double(), read.mean(0), atol=1e-5)
    assert torch.allclose(model[1].running_var.double(), read.var(0), rtol=1e-2)
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if "running" not in n)
    engine.undo()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    with pytest.raises(SurgeryError, match="no batch"):
        engine.reestimate_norms([])
    plain = nn.Sequential(nn.Linear(3, 2))
    engine.track_model(plain, "plain", example_inputs=torch.randn(2, 3))
    with pytest.raises(SurgeryError, match="No norm"):
        engine.reestimate_norms([torch.randn(2, 3)])

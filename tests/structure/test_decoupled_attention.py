"""Attention of torch, whose one width is two: it loses heads, and its twin gives what it gives."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.structure.models import (
    B,
    C,
    H,
    T,
    Torchs,
    encoder,
    engine_of,
    groups_of,
    prune_each,
    tokens,
)
from tests.structure.oracle_masks import no_fast_path, randomise, relative_difference
from tracker import NeuronEngine


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"bias": False}, {"kdim": C, "vdim": C}], ids=str
)
def test_attention_of_torch_loses_heads(options: dict[str, Any]) -> None:
    found = prune_each(lambda: Torchs(**options), tokens())
    assert any(size == H for size in found.values())


def test_separate_projections_of_torchs_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Linear(C, 7)
            self.attention = nn.MultiheadAttention(C, H, kdim=7, vdim=7, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            m = self.memory(x)
            return self.attention(x, m, m, need_weights=False)[0]

    found = prune_each(Cross, tokens())
    assert any(size == H for size in found.values())
    assert 7 in found.values()


def test_encoder_layers_of_torch() -> None:
    found = prune_each(encoder, tokens())
    assert sum(size == H for size in found.values()) == 2


def test_the_fused_encoder_is_not_taken_and_training_goes_on() -> None:
    model = encoder()
    engine = engine_of(model, tokens())
    heads = next(g for g in groups_of(engine) if g.size == H)
    names = list(model.state_dict())
    engine.prune_units({heads.name: [1]})
    assert list(model.state_dict()) == names
    with torch.no_grad():
        fast = model(tokens())  # eval mode, no gradients: torch would take its fused layer
    assert relative_difference(fast, model(tokens()).detach()) < 1e-5
    model.train()(tokens()).square().mean().backward()
    again = pickle.loads(pickle.dumps(model[0].layers[0].self_attn))
    assert again.num_heads == H - 1
    engine.undo()
    assert type(model[0].layers[0].self_attn) is nn.MultiheadAttention


def test_padding_after_a_removal_in_a_later_layer() -> None:
    model = encoder()
    engine = engine_of(model, tokens())
    heads = [g for g in groups_of(engine) if g.size == H]
    engine.prune_units({heads[1].name: [1]})
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():  # nested tensors, if torch had its way
        fast = model[0](tokens(), src_key_padding_mask=padding)
        with no_fast_path():
            slow = model[0](tokens(), src_key_padding_mask=padding)
    assert torch.allclose(fast[~padding], slow[~padding], atol=1e-6)
    engine.undo()
    assert model[0].use_nested_tensor


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_the_twin_gives_what_torch_gives(need_weights: bool, masked: bool, batched: bool) -> None:
    from tracker.structure.adapters.registry import adapt

    theirs = nn.MultiheadAttention(C, H, batch_first=True).double().eval()
    randomise(theirs, 0)
    ours = copy.deepcopy(theirs)
    adapt(ours)
    x = tokens().double() if batched else tokens().double()[0]
    padding = torch.zeros(x.shape[:-1], dtype=torch.bool)
    padding[..., 4] = True
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    for options in (
        {"attn_mask": mask, "key_padding_mask": padding} if masked else {},
        {"attn_mask": mask, "is_causal": masked},
        {"average_attn_weights": False},
    ):
        a = theirs(x, x, x, need_weights=need_weights, **options)
        b = ours(x, x, x, need_weights=need_weights, **options)
        assert torch.allclose(a[0], b[0])
        assert (a[1] is None) == (b[1] is None)
        assert a[1] is None or torch.allclose(a[1], b[1])


# Attention in shifted windows, of torchvision


def windows(version: int, **options: Any) -> nn.Module:
    """Two blocks, the second of which shifts its windows, and a merging of patches."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    own = (
        {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        if version == 2
        else {}
    )
    model = swin.SwinTransformer(
        patch_size=[2, 2], embed_dim=12, depths=[2, 1], num_heads=[3, 2], window_size=[3, 3],
        num_classes=4, stochastic_depth_prob=0.0, **own, **options,
    ).double().eval()  # fmt: skip
    randomise(model, 0)
    return model


PICTURES = (2, 3, 16, 14)  # 8x7 places: padded to windows of 3x3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("size", "shift", "bias"),
    [((9, 12), 1, True), ((8, 7), 1, True), ((3, 7), 1, True), ((2, 2), 0, True), ((8, 7), 2, False)],
)  # fmt: skip
def test_the_twin_of_windows_gives_what_torchvision_gives(
    version: int, size: tuple[int, int], shift: int, bias: bool
) -> None:
    """Outputs and gradients; sides that need padding, and a window that covers one."""
    from torchvision.models import swin_transformer as swin

    from tracker.structure.adapters.registry import adapt, is_adapted

    kind = swin.ShiftedWindowAttentionV2 if version == 2 else swin.ShiftedWindowAttention
    theirs = kind(12, [3, 3], [shift, shift], 3, qkv_bias=bias).double()
    randomise(theirs, 1)
    ours = copy.deepcopy(theirs)
    adapt(ours)
    assert is_adapted(ours)
    assert not is_adapted(theirs)
    x = torch.randn(2, *size, 12, generator=torch.Generator().manual_seed(0)).double()
    a, b = theirs(x), ours(x)
    assert torch.allclose(a, b, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None
        else:
            assert torch.allclose(parameter.grad, gradient, atol=1e-9), name


@pytest.mark.parametrize(
    ("size", "shift"),
    [((4, 6, 9), (1, 1, 1)), ((5, 8, 7), (1, 0, 2)), ((2, 3, 7), (1, 1, 1)), ((1, 2, 2), (0, 0, 0))],
)  # fmt: skip
def test_so_does_that_of_windows_in_three_dimensions(
    size: tuple[int, int, int], shift: tuple[int, int, int]
) -> None:
    from torchvision.models.video import swin_transformer as swin

    from tracker.structure.adapters.registry import adapt

    theirs = swin.ShiftedWindowAttention3d(12, [2, 3, 3], list(shift), 3).double()
    randomise(theirs, 1)
    ours = copy.deepcopy(theirs)
    adapt(ours)
    assert type(ours) is not type(theirs)
    x = torch.randn(2, *size, 12, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(theirs(x), ours(x), atol=1e-12)


def test_video_models_in_windows_lose_heads_and_widths() -> None:
    swin = pytest.importorskip("torchvision.models.video.swin_transformer")

    def video() -> nn.Module:
        model = swin.SwinTransformer3d(
            patch_size=[1, 2, 2], embed_dim=12, depths=[2], num_heads=[3], window_size=[2, 3, 3],
            num_classes=4, stochastic_depth_prob=0.0,
        ).double().eval()  # fmt: skip
        randomise(model, 0)
        return model

    x = torch.randn(1, 3, 4, 14, 8, generator=torch.Generator().manual_seed(0)).double()
    found = prune_each(video, x)
    assert sum(size == 3 and ".qkv" in name for name, size in found.items()) == 2
    assert 12 in found.values()


@pytest.mark.parametrize("version", [1, 2])
def test_attention_in_windows_loses_heads_and_widths(version: int) -> None:
    x = torch.randn(PICTURES, generator=torch.Generator().manual_seed(0)).double()
    found = prune_each(lambda: windows(version), x)
    assert {2, 3, 12, 24} <= set(found.values())  # heads of both stages, and their streams
    assert sum(size in (2, 3) and ".qkv" in name for name, size in found.items()) == 3


@pytest.mark.parametrize("version", [1, 2])
def test_windows_that_lost_heads_train_are_saved_and_come_back(version: int, tmp_path: Any) -> None:
    x = torch.randn(PICTURES, generator=torch.Generator().manual_seed(0)).double()
    model = windows(version)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    engine = engine_of(model, x)
    engine.attach_optimizer(optimizer)
    heads = [g for g in groups_of(engine) if g.size == 3]
    for change in (lambda: engine.prune_units({heads[0].name: [1]}), lambda: None):
        change()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    engine.save_checkpoint(tmp_path / "checkpoint")
    fresh = windows(version)
    NeuronEngine.load_checkpoint(
        tmp_path / "checkpoint", fresh, torch.optim.AdamW(fresh.parameters(), 1e-3)
    )
    assert torch.equal(fresh(x), model(x))
    attention = model.get_submodule(heads[0].name.split(".qkv")[0])
    assert attention.num_heads == 2
    assert type(attention).__name__.startswith("Decoupled")
    engine.undo()
    assert not type(attention).__name__.startswith("Decoupled")

"""A model of ordinary modules: the same outputs, and no need of this library wherever it is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.export import subjects
from tracker import NeuronEngine, SurgeryError, VerificationError
from tracker.export import to_plain

ROOT = Path(__file__).parents[2]
Change = Callable[[NeuronEngine], None]


def insert(*names: str) -> Change:
    def change(engine: NeuronEngine) -> None:
        for name in names:
            engine.insert_layer(after=name)

    return change


def prune(*kinds: str) -> Change:
    def change(engine: NeuronEngine) -> None:
        for name in [g.name for g in engine.structure.groups if g.kind in kinds and g.prunable]:
            engine.prune_units({name: [0]})

    return change


def remove(*names: str) -> Change:
    def change(engine: NeuronEngine) -> None:
        for name in names:
            engine.remove_layer(name, force=True)

    return change


SEQUENCE = (3, 5, 16)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Change]]] = {
    "unchanged": (subjects.mlp, (64, 6), []),
    "inserted": (subjects.mlp, (64, 6), [insert("0", "2", "2.inserted.into"), prune("neuron")]),
    "activation gone": (subjects.mlp, (64, 6), [insert("0"), remove("1")]),
    "convolutions": (subjects.conv, (8, 1, 8, 8), [insert("0", "3"), prune("neuron", "channel")]),
    "head": (subjects.Attention, SEQUENCE, [prune("head")]),
    "no bias": (lambda: subjects.Attention(bias=False), SEQUENCE, [prune("head")]),
    "masks": (subjects.Masked, SEQUENCE, [prune("head")]),
    "widths of heads": (subjects.Attention, SEQUENCE, [prune("head_dim")]),
    "both": (subjects.Masked, SEQUENCE, [prune("head", "head_dim")]),
    "encoder": (subjects.encoder, SEQUENCE, [prune("head", "neuron")]),
    "copy of a block": (subjects.Stack, (64, 6), [insert("blocks.1", "blocks.1.inserted")]),
    "block gone": (subjects.Stack, (64, 6), [remove("blocks.2"), insert("blocks.0")]),
    "block gone, by number": (subjects.Numbered, (64, 6), [remove("blocks.2"), prune("neuron")]),
}


def changed(case: str) -> tuple[nn.Module, NeuronEngine, Tensor]:
    """A model that was changed and trained a little since, so that nothing inserted is silent."""
    build, shape, changes = CASES[case]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    engine = NeuronEngine()
    engine.track_model(model, case, example_inputs=x)
    for change in changes:
        change(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    engine.start_tracking()
    return model, engine, x


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(x)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[nn.Module, Tensor, nn.Module]]:
    """By case: the model, an input, and the plain model."""
    found = {}
    for case in CASES:
        model, engine, x = changed(case)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        found[case] = model, x, to_plain(engine)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], t) for name, t in before.items())
    return found


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_equal_and_nothing_is_left(
    case: str, exported: dict[str, tuple[nn.Module, Tensor, nn.Module]]
) -> None:
    model, x, plain = exported[case]
    for expected, found in zip(outputs(model, x), outputs(plain, x), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    for module in plain.modules():
        assert not type(module).__module__.startswith("tracker.")
        assert not [name for name in vars(module) if name.startswith("_tracker_")]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not held & {p.untyped_storage().data_ptr() for p in plain.parameters()}


def test_files_load_where_this_library_is_not(
    exported: dict[str, tuple[nn.Module, Tensor, nn.Module]], tmp_path: Path
) -> None:
    for i, (_, x, plain) in enumerate(exported.values()):
        torch.save(plain, tmp_path / f"{i}.model")
        torch.save((x, outputs(plain, x)), tmp_path / f"{i}.values")
    code = (
        "import sys; sys.modules['tracker'] = None\n"
        "import torch\n"
        f"for i in range({len(exported)}):\n"
        "    model = torch.load(f'{i}.model', weights_only=False)\n"
        "    x, expected = torch.load(f'{i}.values')\n"
        "    found = model(x)\n"
        "    found = found if isinstance(found, tuple) else [found]\n"
        "    assert all(torch.equal(a, b) for a, b in zip(found, expected)), i\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["inserted", "convolutions", "head", "activation gone"])
def test_it_is_scripted_traced_quantized_and_exported(
    case: str, exported: dict[str, tuple[nn.Module, Tensor, nn.Module]]
) -> None:
    _, x, plain = exported[case]
    expected = outputs(plain, x)[0]
    with torch.no_grad():
        assert torch.equal(torch.jit.script(plain)(x), expected)
        assert torch.equal(torch.jit.trace(plain, x, check_trace=False)(x), expected)
        assert torch.allclose(torch.export.export(plain, (x,)).module()(x), expected, atol=1e-6)
        quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
        assert torch.allclose(quantized(x), expected, atol=0.2 * float(expected.abs().max()))


def test_parameters_are_as_many_and_train() -> None:
    _model, engine, x = changed("head")  # the engine does not keep it alive
    plain = to_plain(engine)
    assert sum(p.numel() for p in plain.parameters()) == engine.count_parameters()
    plain.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_a_state_dict_of_it_carries_no_journal() -> None:
    model, engine, _ = changed("inserted")
    engine.carry_journal()
    assert "_tracker_journal" in model.state_dict()
    assert not [key for key in to_plain(engine).state_dict() if key.startswith("_tracker")]


def test_what_differs_is_refused() -> None:
    """A hook of the user's that changes outputs is left out, and so noticed."""
    model, engine, _ = changed("inserted")
    model.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(VerificationError, match="differ by"):
        to_plain(engine)


def test_a_part_of_this_library_is_named() -> None:
    model, engine, _ = changed("unchanged")
    model.engine = engine.journal  # type: ignore[assignment]
    with pytest.raises(SurgeryError, match="would not load without this library"):
        to_plain(engine)

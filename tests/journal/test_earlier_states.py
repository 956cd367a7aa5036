"""An earlier state, or one of another branch, loads into the model as it is now: it becomes what it was then."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tests.surgery.subjects import MODELS, OPTIMIZERS, equal, snapshot, train
from tracker import CheckpointError, NeuronEngine, SurgeryError


class Scaled(nn.Module):
    """A buffer that is in no state dict scales each neuron."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("gain", torch.arange(1.0, 9.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.into(x)) * self.gain)


KINDS: dict[str, Any] = {**MODELS, "scaled": (Scaled, (40, 6))}


class Run:
    """A model in training, with all that was saved of it."""

    def __init__(self, name: str, optimizer: str = "Adam") -> None:
        torch.manual_seed(0)
        build, shape = KINDS[name]
        self.model, self.x = build(), torch.randn(shape)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.engine = NeuronEngine()
        self.engine.track_model(self.model, name, example_inputs=self.x[:8])
        self.engine.attach_optimizer(self.optimizer)
        self.engine.carry_journal()
        self.states: list[Any] = []

    def train(self) -> list[float]:
        return [train(self.model.train(), self.optimizer, self.x) for _ in range(2)]

    def save(self) -> None:
        self.train()
        states = copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])
        self.states.append((states, self.what_it_is()))

    def what_it_is(self) -> list[Any]:
        self.model.eval()
        return [
            str(self.model),
            self.model(self.x).detach(),
            self.engine.track_model(self.model),
            self.engine.journal.to_dict(),
            [tuple(p.shape) for g in self.optimizer.param_groups for p in g["params"]],
        ]

    def change(self, rng: random.Random) -> None:
        """One change at random; what cannot be done is another one."""
        layers = self.engine.get_summary()["layers"]
        first = next(g.layers[0] for g in self.engine.structure.groups if g.prunable)
        group = rng.choice([g for g in self.engine.structure.groups if g.prunable and g.size > 3])
        ways = [
            lambda: self.engine.prune_units({group.name: rng.sample(range(group.size), 2)}),
            lambda: self.engine.expand_layer(rng.choice(list(layers)), 2),
            lambda: self.engine.recycle_neurons({rng.choice(list(layers)): [0]}),
            lambda: self.engine.insert_layer(first),
            lambda: self.engine.remove_layer(
                rng.choice([n for n, m in self.model.named_modules() if n]), force=True
            ),
        ]
        rng.shuffle(ways)
        for way in ways:
            try:
                way()
            except SurgeryError:
                continue
            return


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_state_of_before_or_of_another_branch_loads(name: str, seed: int) -> None:
    run, rng = Run(name), random.Random(seed)
    run.save()
    for _ in range(5):
        run.change(rng)
        run.save()
    for number, (states, wanted) in enumerate(rng.sample(run.states, 4)):
        run.model.load_state_dict(states[0])
        assert equal(run.what_it_is(), wanted)
        run.optimizer.load_state_dict(copy.deepcopy(states[1]))
        losses = run.train()
        if number % 2:  # another branch begins here
            run.change(rng)
            run.save()
        assert losses == again_losses(name, states)


def again_losses(name: str, states: Any) -> list[float]:
    """What the steps after a load are in a model that was built anew."""
    again = Run(name)
    again.model.load_state_dict(states[0])
    again.optimizer.load_state_dict(copy.deepcopy(states[1]))
    return again.train()


def split(model: nn.Module) -> torch.optim.Optimizer:
    """Weights decay and biases do not, in an order of their own."""
    parts = [[p for p in model.parameters() if (p.ndim > 1) is flag] for flag in (True, False)]
    return torch.optim.AdamW([{"params": parts[0][::-1]}, {"params": parts[1], "weight_decay": 0}])


def test_groups_of_an_optimizer_are_what_they_were() -> None:
    run = Run("mlp")
    run.engine.detach_optimizer(run.optimizer)
    run.optimizer = split(run.model)
    run.engine.attach_optimizer(run.optimizer)
    run.save()
    run.engine.insert_layer("0")
    run.engine.remove_layer("2", force=True)
    run.save()
    held = [[id(p) for p in g["params"]] for g in run.optimizer.param_groups]
    for states, wanted in run.states:
        run.model.load_state_dict(states[0])
        assert equal(run.what_it_is(), wanted)
        run.optimizer.load_state_dict(copy.deepcopy(states[1]))
        run.train()
    assert [len(g) for g in held] == [len(g["params"]) for g in run.optimizer.param_groups]

    other = split(run.model)  # of which nobody knows where the layer belongs that comes back
    run.engine.attach_optimizer(other)
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(CheckpointError, match="freshly built"):
        run.model.load_state_dict(run.states[0][0][0])
    assert equal(snapshot(run.model, run.optimizer), before)
    run.engine.detach_optimizer(other)
    run.model.load_state_dict(run.states[0][0][0])


class Heads(nn.Module):
    """Heads of torch's own attention can go, and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


def test_heads_come_back() -> None:
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(3, 5, 8)
    engine = NeuronEngine()
    engine.track_model(model, "heads", example_inputs=x)
    engine.carry_journal()
    states = []
    for _ in range(3):
        states.append((copy.deepcopy(model.state_dict()), model(x)))
        group = next(g for g in engine.structure.groups if 2 <= g.size <= 4 and g.prunable)
        engine.prune_units({group.name: [0]})
    for number in (0, 2, 1):
        state, wanted = states[number]
        model.load_state_dict(state)
        assert torch.allclose(model(x), wanted, atol=1e-6)  # its forward is another one by now
        assert engine.structure.groups


@pytest.mark.parametrize("what", ["follower", "shape", "missing", "ids", "architecture", "tied"])
def test_what_cannot_be_loaded_leaves_all_as_it_is(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("residual" if what == "tied" else "mlp")
    if what == "tied":
        run.model.blocks[2][3].weight = run.model.blocks[1][3].weight
    run.save()
    if what == "tied":
        run.engine.remove_layer("blocks.1", force=True)
    else:
        run.engine.prune_neurons({"0": [1]})
        run.engine.insert_layer("2")
    run.save()
    state: Any = dict(run.states[0][0][0])
    if what == "follower":
        average = AveragedModel(run.model)
        run.engine.attach_follower(average)
    elif what == "shape":
        state["0.weight"] = torch.zeros(5, 6)
        state["_tracker_journal"] = torch.tensor([*b'{"schema_version": 1, "entries": []}']).byte()
    elif what == "missing":
        del state["0.weight"]
        state["_tracker_journal"] = torch.tensor([*b'{"schema_version": 1, "entries": []}']).byte()
    elif what == "tied":
        state["stem.weight"] = torch.zeros(5, 6)
    elif what in ("ids", "architecture"):
        owner, name = {
            "ids": ("tracker.checkpoint.recorder", "restore_layers"),
            "architecture": ("tracker.journal.origin.Origin", "_regroup"),
        }[what]
        monkeypatch.setattr(f"{owner}.{name}", lambda *args: 1 / 0)
    before, known = snapshot(run.model, run.optimizer), run.what_it_is()
    with pytest.raises((CheckpointError, RuntimeError)):
        run.model.load_state_dict(state)
    monkeypatch.undo()
    assert equal(snapshot(run.model, run.optimizer), before)
    assert equal(run.what_it_is(), known)
    if what == "follower":
        run.engine.detach_follower(average)
        run.model.load_state_dict(state)
        assert equal(run.what_it_is(), run.states[0][1])
    run.engine.prune_units({run.engine.structure.groups[0].name: [0]})
    run.train()


def test_a_checkpoint_loads_into_the_model_as_it_is(tmp_path: Any) -> None:
    run = Run("mlp")
    saved: list[Any] = []

    def save() -> None:
        run.train()
        run.engine.save_checkpoint(tmp_path / str(len(saved)))
        saved.append(run.what_it_is())

    save()
    run.engine.prune_neurons({"0": [1, 2]})
    save()
    run.engine.insert_layer("0")
    run.engine.expand_layer("0", 3)
    run.engine.remove_layer("2", force=True)
    save()
    for number in (1, 0, 2, 1):
        before, path = run.engine, tmp_path / str(number)
        run.engine = NeuronEngine.load_checkpoint(path, run.model, run.optimizer)
        assert equal(run.what_it_is(), saved[number])
        with pytest.raises(SurgeryError, match="by another engine"):
            before.prune_neurons({"0": [0]})
        again = Run("mlp")
        NeuronEngine.load_checkpoint(path, again.model, again.optimizer)
        assert run.train() == again.train()


def test_buffers_of_no_state_dict_come_along() -> None:
    run = Run("scaled")
    run.engine.prune_neurons({"into": [1, 3]})
    run.engine.expand_layer("into", 2)
    other = Run("scaled")
    other.model.load_state_dict(run.model.state_dict())
    assert torch.equal(other.model.gain, run.model.gain)
    assert torch.equal(other.model(run.x), run.model(run.x))

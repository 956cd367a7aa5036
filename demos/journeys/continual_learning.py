"""Continual learning: the task changes, and a rule of one's own grows the network where the new one pulls hardest."""

import torch
from torch import nn

from tracker import NeuronEngine, Policy, Requests

STEPS = 200  # of each task


class GrowWhenTheTaskChanges:
    """Widens the steepest layer once the loss has jumped, and gives dead neurons a new start."""

    def __init__(self) -> None:
        self.jumps: list[int] = []

    def decide(self, candidates, now, losses, blocked, *, step):
        """What is to be done at a look; None for nothing."""
        if len(losses) > 1 and losses[-1] > 1.5 * losses[-2] and now.parameters < 2_000:
            self.jumps.append(step)
            steepest = max(candidates, key=lambda c: c.gradient)
            return Requests(f"the loss jumped to {losses[-1]:.3f}", expand={steepest.name: 8})
        dead = {c.name: c.dead for c in candidates if c.dead and not blocked.get(c.name)}
        return Requests("neurons that say nothing get a new start", recycle=dead) if dead else None


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
engine = NeuronEngine()
engine.track_model(model, "continual", example_inputs=torch.randn(16, 6))
engine.attach_optimizer(optimizer)
rule = GrowWhenTheTaskChanges()
engine.start_self_modification(
    Policy.of(rule, warm_up=40, every=40, look=8, settle=20, grow=True, recycle=True)
)
for task in range(3):
    teacher = torch.randn(6, 2)
    for _ in range(STEPS):
        x = torch.randn(64, 6)
        loss = (model(x) - (x @ teacher).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine.step(loss)
    print(f"task {task}: loss {loss.item():.3f}, {engine.count_parameters():,} parameters")
for decision in engine.life:
    if decision.what != "kept":
        print(decision.step, decision.what, decision.why)
engine.print_plasticity_report()
ages = engine.get_neuron_ages()
assert rule.jumps
assert model[0].out_features + model[2].out_features > 32
assert min(min(layer.values()) for layer in ages.values()) < 3 * STEPS

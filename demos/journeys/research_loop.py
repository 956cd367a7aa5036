"""A researcher's loop: bf16, an average of the weights (EMA), accumulated gradients, a schedule; it changes itself."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tracker import NeuronEngine, Policy

STEPS, ACCUMULATE = 240, 2


class Net(nn.Module):
    """Channels, then a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Linear(16 * 16, 64)
        self.out = nn.Linear(64, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (n, 1, 8, 8); returns logits (n, 4)."""
        return self.out(self.hidden(self.features(images).flatten(1)).relu())


torch.manual_seed(0)
images = torch.randn(2048, 1, 8, 8)
labels = (images[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (images[:, 0, :, :4].mean((1, 2)) > 0)

model = Net()
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))

engine = NeuronEngine()
engine.track_model(model, "research", example_inputs=images[:8])
engine.attach_optimizer(optimizer)
engine.attach_follower(ema)  # the average changes as the model does
engine.start_self_modification(Policy(tolerance=0.02, protect=["features"]), steps=STEPS)

for _ in range(STEPS):
    mean = 0.0
    for batch in torch.randint(0, len(images), (ACCUMULATE, 64)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch]) / ACCUMULATE
        loss.backward()
        mean += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    ema.update_parameters(model)
    receipt = engine.step(mean)
    if receipt is not None:
        print(receipt)

with torch.no_grad():
    right = [
        float((net(images).argmax(1) == labels).float().mean())
        for net in (model.eval(), ema.eval())
    ]
print(
    f"{engine.count_parameters():,} parameters; right: {right[0]:.1%}, of the average {right[1]:.1%}"
)
assert len(engine.journal) > 0
assert model.hidden.weight.shape == ema.module.hidden.weight.shape
assert model.features[0].out_channels == 16
assert min(right) > 0.85

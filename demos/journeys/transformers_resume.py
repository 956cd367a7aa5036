"""transformers' Trainer: a small language model that changes itself, resumed from its last checkpoint, and saved."""

import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from tracker import Policy
from tracker.integrations.pretrained import save_pretrained_uniform
from tracker.integrations.transformers import SelfModificationCallback


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )


tokens = (torch.arange(16) * torch.randint(1, 5, (256, 1)) + torch.randint(0, 64, (256, 1))) % 64
data = [{"input_ids": row, "labels": row} for row in tokens]
folder = tempfile.mkdtemp()


def trainer(steps: int) -> tuple[Trainer, SelfModificationCallback]:
    callback = SelfModificationCallback(Policy.over(40, tolerance=0.05))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(build(), arguments, train_dataset=data, callbacks=[callback]), callback


first, _ = trainer(20)
first.train()
second, callback = trainer(40)
second.train(resume_from_checkpoint=True)
engine = callback.engine
print(engine.journal)
assert len(engine.journal) > 0
assert engine.life[0].step == 0

with tempfile.TemporaryDirectory() as path:
    receipt = save_pretrained_uniform(engine, path)
    print(receipt)
    loaded = AutoModelForCausalLM.from_pretrained(path)
with torch.no_grad():
    ids = tokens[:2]
    same = torch.equal(loaded(ids).logits, second.model.eval()(ids).logits)
print("loaded by from_pretrained, the same:", same)
assert same

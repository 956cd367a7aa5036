"""The sections of one_shot.py on a share of a network's FLOPs: ResNet-20 and a small ViT, with and without an epoch."""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _common import OUTPUTS
from _one_shot_cases import CALIBRATION, Case, image_loss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fashion_mnist_mlp import evaluate, get_data_loaders, set_seed
from tracker import NeuronEngine
from tracker.errors import SurgeryError

KEEP = 0.5
RATE = 1e-3  # of Adam; falls by a cosine
DENSE, OURS = "dense", "tracker, `compress`"
INEXACT = "tracker, `compress(inexact=True)`"
NOT_FOR = {INEXACT: ("resnet20",)}  # the same there: no LayerNorm runs over the residual stream
EPOCHS = {"resnet20": 3, "vit": 6}  # of the dense network
Row = dict[str, Any]


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut (He et al., 2015, sections 3.3 and 4.2)."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.shortcut = nn.Identity()
        if a != b or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, a, H, W) → (N, b, H / stride, W / stride)."""
        return (self.bn2(self.conv2((self.bn1(self.conv1(x))).relu())) + self.shortcut(x)).relu()


class ResNet20(nn.Module):
    """As for CIFAR-10: 16, 32 and 64 channels, three blocks of each; one channel goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        blocks = [
            BasicBlock(b if i else a, b, 1 if i else s) for a, b, s in widths for i in range(3)
        ]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 1, 28, 28) → logits (N, 10)."""
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


def vit() -> nn.Module:
    """Timm's, 4 blocks of width 96 with 4 heads, on patches of 4 × 4."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10,
        embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": ResNet20, "vit": vit}


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> int:
    """Of one forward pass, attention included: fused kernels have no formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def trained(model: nn.Module, seed: int, epochs: int, told: str) -> nn.Module:
    """It, trained by Adam; the same batches in the same order for each model of a seed."""
    loader, _ = get_data_loaders(128, None, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    with tqdm(total=epochs * len(loader), desc=told, leave=False, disable=None) as bar:
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                image_loss(model, images, labels).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def case_of(name: str, seed: int) -> Case:
    """The dense network; it is trained once, and then read from outputs/."""
    path = OUTPUTS / f"one_shot_{name}_{seed}.pt"
    set_seed(seed)
    model = NETWORKS[name]()
    if not path.exists():
        trained(model, seed, EPOCHS[name], f"Training {name}, seed {seed}")
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    train, test = get_data_loaders(128, None, seed=seed + 1000)
    pairs = [pair for pair, _ in zip(train, range(CALIBRATION), strict=False)]
    return Case(
        model.eval(), pairs, image_loss, lambda m: evaluate(m, test)[1], "{:.2%}",
        torch.cat([x for x, _ in pairs[:2]]), pairs[0][0],
    )  # fmt: skip


def compress(model: nn.Module, case: Case, inexact: bool = False) -> dict[str, Any]:
    """Ours as a user calls it."""
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=case.example)
    receipt = engine.compress(
        KEEP, of="flops", batches=case.pairs, inputs=lambda pair: pair[0],
        loss=lambda output, pair: nn.functional.cross_entropy(output, pair[1]),
        inexact=inexact, progress=False,
    )  # fmt: skip
    return {"notes": list(receipt.notes), "candidates": dict(receipt.candidates)}


def theirs(model: nn.Module, case: Case, taylor: bool, together: bool = False) -> dict[str, Any]:
    """Torch-Pruning to the same FLOPs: the ratio is found by bisection.

    together: One ranking over all layers of the same shape of group (Isomorphic Pruning, arXiv 2407.04616), as its
    authors advise; otherwise the same ratio for each.
    """
    import torch_pruning as tp

    grads = gradients(model, case) if taylor else None
    whole = flops(model, case.example)

    def pruned(ratio: float) -> nn.Module:
        found = copy.deepcopy(model)
        if grads is not None:
            for p, g in zip(found.parameters(), grads, strict=True):
                p.grad = g.clone()
        attention = [m for m in found.modules() if hasattr(m, "qkv")]
        pruner = tp.pruner.BasePruner(
            found,
            case.example,
            importance=tp.importance.GroupTaylorImportance()
            if taylor
            else tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=together,
            isomorphic=together,
            max_pruning_ratio=0.9,
            ignored_layers=[found.head],
            num_heads={m.qkv: m.num_heads for m in attention},
        )
        pruner.step()
        for m in attention:  # as its example for vision transformers does
            m.num_heads = pruner.num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
            m.attn_dim = m.num_heads * m.head_dim
        found.zero_grad()
        return found

    low, high = 0.0, 0.9
    for _ in range(9):
        ratio = (low + high) / 2
        over = flops(pruned(ratio), case.example) > KEEP * whole
        low, high = (ratio, high) if over else (low, ratio)
    become(model, pruned(high))
    return {"ratio": high}


def gradients(model: nn.Module, case: Case) -> list[Tensor]:
    """Of the loss, summed over the calibration batches."""
    for x, y in case.pairs:
        case.loss(model, x, y).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def become(model: nn.Module, other: nn.Module) -> None:
    """What the other is, in place."""
    model.__dict__.update(other.__dict__)


METHODS: dict[str, Callable[[nn.Module, Case], dict[str, Any]]] = {
    DENSE: lambda model, case: {},
    OURS: compress,
    INEXACT: partial(compress, inexact=True),
    "Torch-Pruning, magnitude": partial(theirs, taylor=False),
    "Torch-Pruning, Taylor": partial(theirs, taylor=True),
    "Torch-Pruning, Taylor, isomorphic": partial(theirs, taylor=True, together=True),
}


def known(file: Path) -> list[Row]:
    """Rows of earlier runs."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def measure(
    name: str, seeds: int, file: Path, restated: Callable[[nn.Module, Case], nn.Module]
) -> list[Row]:
    """The rows of a network that the file does not have yet, and those that it has.

    restated: Takes the statistics of batch norms anew, on a copy.
    """
    rows = known(file)
    for seed in range(seeds):
        done = {(r["network"], r["method"]) for r in rows if r["seed"] == seed}
        todo = [m for m in METHODS if (name, m) not in done and name not in NOT_FOR.get(m, ())]
        case = case_of(name, seed) if todo else None
        for method in tqdm(todo, f"{name}, seed {seed}", leave=False, disable=None):
            assert case is not None
            rows.append({"network": name, "seed": seed, **row(method, case, seed, restated)})
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    return [r for r in rows if r["network"] == name]


def row(
    method: str, case: Case, seed: int, restated: Callable[[nn.Module, Case], nn.Module]
) -> Row:
    """What one method leaves."""
    model, start = copy.deepcopy(case.dense), time.process_time()
    found: Row = {"method": method, "date": str(datetime.date.today())}
    try:
        found |= METHODS[method](model, case)
    except SurgeryError as error:
        return found | {"refused": str(error)}
    found["seconds"] = time.process_time() - start
    model.eval()
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    found |= {
        "flops": flops(model, case.example) / flops(case.dense, case.example),
        "parameters": size(model) / size(case.dense),
        "score": case.score(model),
        "again": case.score(restated(model, case)) if normed else None,
    }
    found["after"] = case.score(trained(model, seed, 1, f"{method}, one epoch"))
    return found


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


EXPLANATION = """Half of the FLOPs of a forward pass stay. Dense: {epochs} epochs of Adam, learning rate 1e-3 that
falls by a cosine. Calibration data: 80 batches of 128. "After an epoch": one more epoch, the same for all, for the
dense network too. CPU seconds of the whole removal, one thread. `compress`: `engine.compress(0.5, of="flops",
batches=batches, loss=loss)`, all other arguments at their defaults; `inexact=True` may take from the residual stream
too, as Torch-Pruning does. Torch-Pruning: the ratio that gives half of the FLOPs, found by bisection; the same for each
layer, or one ranking over all that are alike (Isomorphic Pruning, [2407.04616](https://arxiv.org/abs/2407.04616))."""


def section(name: str, rows: list[Row]) -> str:
    """The text of the page."""
    normed = any(r.get("again") is not None for r in rows)
    head = ["method", "seeds", "FLOPs", "parameters", "after removal"]
    head += [*["BN re-estimated"] * normed, "after an epoch", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method and "score" in r]
        if not mine:
            refused = next(
                (r["refused"] for r in rows if r["method"] == method and "refused" in r), None
            )
            lines += (
                [f"| {method} | refused: {refused} |" + " |" * (len(head) - 2)] if refused else []
            )
            continue
        cells = [method, str(len(mine))]
        for field in ("flops", "parameters", "score", *["again"] * normed, "after"):
            digits = 1 if field in ("flops", "parameters") else 2
            cells.append(f"{mean(r[field] for r in mine):.{digits}%}")
        lines.append(f"| {' | '.join([*cells, format(mean(r['seconds'] for r in mine), '.0f')])} |")
    return "\n\n".join([EXPLANATION.format(epochs=EPOCHS[name]), "\n".join(lines)])

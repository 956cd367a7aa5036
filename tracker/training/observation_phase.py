"""A look: for some steps the training passes themselves are observed, and nothing else is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracker.inputs.forward_pass import Arguments
from tracker.inputs.serialized import gather_inputs, inputs_from
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.observation.consumer_inputs import Read
from tracker.surgery.calibration.consumers import Watcher, consumers
from tracker.surgery.calibration.growth_directions import GradientWatcher, directions_of
from tracker.tracker import ActivationTracker
from tracker.training.candidates import grown
from tracker.training.policy import Policy

# Keys of tensors in a checkpoint.
PRODUCT, INPUT, NORM = "look.product/", "look.input/", "look.norm/"


@dataclass(slots=True)
class Seen:
    """What a look saw beside what consumers read.

    products: By layer, Σ δᵀx over its passes: see `directions_of`. inputs: Of the model's passes, in order.
    norms: By parameter, (2,): Σ ‖gradient‖² over its backward passes, and their number.
    """

    products: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Arguments] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self) -> dict[str, float]:
        """Mean square of the gradient by parameter, of those that got one."""
        pairs = {name: value.tolist() for name, value in self.norms.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def directions(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """Incoming weights for new units, best first, of those layers of which the gradients tell."""
        found = {n: directions_of(self.products[n]) for n in layers if n in self.products}
        return {name: best for name, best in found.items() if best is not None}

    def gather(self) -> tuple[dict[str, Tensor], Any]:
        """Tensors by key, and where the inputs stand among them."""
        tables, places = gather_inputs((tuple(tuple(pair) for pair in self.inputs), {}))
        products = {PRODUCT + name: value for name, value in self.products.items()}
        products |= {NORM + name: value.cpu() for name, value in self.norms.items()}
        return {**products, **{INPUT + key: value for key, value in tables.items()}}, places

    def go_on(self, tables: Mapping[str, Tensor], places: Any) -> None:
        """Have seen this already.

        Raises:
            KeyError, TypeError, ValueError: It is nothing that `gather` gave.
        """
        for key, value in tables.items():
            name = key.removeprefix(PRODUCT)
            if name != key:
                if name not in self.products:
                    continue  # it does not grow any more
                if self.products[name].shape != value.shape:
                    raise ValueError(f"the gradients of {name} have another shape")
                self.products[name].copy_(value)
            if key.startswith(NORM):
                self.norms[key.removeprefix(NORM)].copy_(value.view(2))
        mine = {k.removeprefix(INPUT): v for k, v in tables.items() if k.startswith(INPUT)}
        passes = inputs_from(mine, places)
        self.inputs[:] = [Arguments(*pair) for pair in passes[0]] if passes is not None else []  # type: ignore[misc]


class Look:
    """Hooks on the model of a tracker until `stop`: what its policy wants to know."""

    def __init__(self, tracker: ActivationTracker, policy: Policy) -> None:
        model = tracker.current.model()
        groups = [g for g in tracker.structure().groups if g.prunable and g.exact]
        wanted, _ = consumers(model, groups)
        self.seen = Seen()
        self._watcher = Watcher(model, wanted)
        self._handles: list[Any] = []
        if policy.grow and policy.gradients:
            readers = {}
            for group in groups:
                layer, own = grown(tracker, group)
                if own == 1 and layer in tracker.current.layers:
                    reads = [t for (t, _), role in group.roles.items() if role == "reads"]
                    readers[layer] = sorted({t.rpartition(".")[0] for t in reads})
            self._gradients = GradientWatcher(model, readers, self.seen.products)
            self._handles += self._gradients.handles
        if type(policy).decide is not Policy.decide:
            self._handles += _norm_hooks(model, self.seen.norms)
        if policy.drop:
            hook = _InputHook(self.seen.inputs)
            self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))

    def stop(self) -> dict[str, Read]:
        """Take the hooks off; what consumers read, by their weights' names."""
        while self._handles:
            self._handles.pop().remove()
        return self._watcher.stop()

    def reads(self) -> dict[str, Read]:
        """What consumers read so far."""
        return self._watcher.seen()

    def go_on(self, reads: Mapping[str, Read], tables: Mapping[str, Tensor], places: Any) -> None:
        """Have seen this already; see `Seen.gather`."""
        self._watcher.go_on(reads)
        self.seen.go_on(tables, places)


def _norm_hooks(model: nn.Module, norms: dict[str, Tensor]) -> list[Any]:
    """Hooks that add up squares of the gradients of all parameters, each as a backward pass brings it."""
    handles = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        sums = norms[name] = torch.zeros(2, device=parameter.device)

        def arrived(gradient: Tensor, sums: Tensor = sums) -> None:
            with torch.no_grad():
                dense = gradient.coalesce().values() if gradient.is_sparse else gradient
                sums[0] += dense.detach().float().square().sum()
                sums[1] += 1

        handles.append(parameter.register_hook(arrived))
    return handles


class _InputHook(GraphHook):
    """Keeps what the model takes. Inside a compiled graph it sees nothing."""

    def __init__(self, inputs: list[Arguments]) -> None:
        super().__init__()
        self._inputs = inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_compiling() or not module.training or not is_new_data():
            return
        self._inputs.append(Arguments(args, dict(kwargs)))

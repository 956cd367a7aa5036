"""A look: for some steps the training passes themselves are observed, and nothing else is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracker.inputs.calls import Arguments
from tracker.observation.compiled import GraphHook, is_new_data
from tracker.observation.consumer_inputs import ConsumerInput
from tracker.surgery.calibration.consumers import Consumer, Watcher, consumers
from tracker.surgery.calibration.growth_directions import GradientWatcher
from tracker.tracker import ActivationTracker
from tracker.training.candidates import grown
from tracker.training.policy import Policy
from tracker.training.seen import CollectedSignals
from tracker.training.sensitivity import LossWatcher, RecordedPass
from tracker.utils.nested import tensors_in

ROWS = (
    512  # of what a layer reads in one pass, or two for each of its columns: more tell little more
)


class ObservationPhase:
    """Hooks on the model of a tracker until `stop`: what its policy wants to know."""

    def __init__(self, tracker: ActivationTracker, policy: Policy) -> None:
        model = tracker.current.model()
        groups = [g for g in tracker.structure().groups if g.prunable and g.exact]
        self.wanted, _ = consumers(model, groups)
        self.seen = CollectedSignals()
        self._watcher = Watcher(model, self.wanted, most=ROWS)
        self._handles: list[Any] = []
        self._bent: LossWatcher | None = None
        if policy.gradients:
            self._bent = LossWatcher(model, self.wanted, self.seen.bent, self.seen.facts)
            self._handles += self._bent.handles
        if policy.grow and policy.gradients:
            readers = {}
            for group in groups:
                layer, own = grown(tracker, group)
                if own == 1 and layer in tracker.current.layers:
                    reads = [t for (t, _), role in group.roles.items() if role == "reads"]
                    readers[layer] = sorted({t.rpartition(".")[0] for t in reads})
                    self.seen.readers[layer] = tuple(f"{name}.weight" for name in readers[layer])
            self._gradients = GradientWatcher(model, readers, self.seen.products, self.seen.into)
            self._handles += self._gradients.handles
        if type(policy).decide is not Policy.decide:
            self._handles += _norm_hooks(model, self.seen.norms)
        if policy.recycle and policy.dormant:
            for one in self.wanted:
                weight = model.get_parameter(one.weight)
                sums = torch.zeros(
                    weight.shape[one.reads] + 1, dtype=torch.float64, device=weight.device
                )
                self.seen.sizes[one.weight] = sums
                module = model.get_submodule(one.module)
                self._handles.append(
                    module.register_forward_pre_hook(_SizeHook(one, sums), with_kwargs=True)
                )
        if policy.drop:
            hook = _InputHook(self.seen.inputs)
            self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def witnesses(self) -> tuple[RecordedPass, ...]:
        """The last passes of it that were sent back, where their loss can be measured again."""
        return () if self._bent is None else self._bent.witnesses

    def stop(self) -> dict[str, ConsumerInput]:
        """Take the hooks off; what consumers read, by their weights' names."""
        while self._handles:
            self._handles.pop().remove()
        return self._watcher.stop()

    def reads(self) -> dict[str, ConsumerInput]:
        """What consumers read so far."""
        return self._watcher.seen()

    def restore_state(
        self, reads: Mapping[str, ConsumerInput], tables: Mapping[str, Tensor], places: Any
    ) -> None:
        """Have seen this already; see `CollectedSignals.gather`."""
        self._watcher.restore_state(reads)
        self.seen.restore_state(tables, places)


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


class _SizeHook(GraphHook):
    """Adds up |x| of what a consumer reads. Inside a compiled graph it sees nothing."""

    def __init__(self, one: Consumer, sums: Tensor) -> None:
        super().__init__()
        self._one, self._sums = one, sums

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the consumer."""
        if torch.compiler.is_compiling() or not is_new_data():
            return
        with torch.no_grad():
            x = tensors_in((args, kwargs))[0].detach().abs()
            axis = self._one.axis % x.ndim
            self._sums[:-1] += x.sum([d for d in range(x.ndim) if d != axis])
            self._sums[-1] += x.numel() // x.shape[axis]


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

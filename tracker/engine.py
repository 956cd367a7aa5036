"""The facade: what looks (`NeuronWatcher`), and what knows and changes structure. No arithmetic here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tracker import surgery
from tracker.errors import SurgeryError, UnknownNeuronError
from tracker.identity import layer_named
from tracker.structure import Structure
from tracker.surgery import Receipt
from tracker.watcher import NeuronWatcher


class NeuronEngine(NeuronWatcher):
    """Watches every neuron of a model, tells which ones matter, and removes them in place.

    Calls speak of the current model: the last one that was tracked, or whose hooks were registered. Calls that begin
    with `print_`, and the two reports `generate_neuron_report` and `generate_pruning_recommendations`, print; all
    others are silent and return records.

    Args:
        activation_threshold: A neuron fires where |activation| is larger.
        correlation_threshold: |Pearson correlation| from which on two neurons are redundant.
        observe: "reads": a neuron is observed where its consumers read it, behind its nonlinearity (where structure
            cannot tell, at its layer's output); "output": each layer's own output.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> engine = NeuronEngine()
        >>> engine.track_model(model, "tiny")
        {'0': [0, 1, 2], '2': [3, 4]}
        >>> engine.start_tracking()
        >>> _ = model(torch.ones(8, 4))
        >>> engine.stop_tracking()
        >>> engine.get_neuron_stats(0)["observations"]
        8
    """

    def __init__(
        self,
        activation_threshold: float = 0.01,
        correlation_threshold: float = 0.9,
        *,
        observe: str = "reads",
    ) -> None:
        super().__init__(activation_threshold, correlation_threshold, observe=observe)
        self._optimizers: list[Any] = []
        self._followers: list[nn.Module] = []
        self._undo: surgery.UndoLog | None = None

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together: traced when first asked; the model is not changed.

        Raises:
            StructureError: The model has not run yet and no example inputs were given, or it cannot be traced.
        """
        return self._tracker.structure()

    def attach_optimizer(self, *optimizers: Any) -> None:
        """Have the state of these optimizers move with every change of the model."""
        self._optimizers += [
            o for o in optimizers if not any(o is known for known in self._optimizers)
        ]

    def attach_follower(self, *models: nn.Module) -> None:
        """Have these copies of the model (an EMA, say) change alike."""
        self._followers += [m for m in models if not any(m is known for known in self._followers)]

    def prune_units(
        self,
        units: Mapping[str, Sequence[int]],
        compensate: bool = False,
        *,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Remove units in place: {group name: unit indices}, groups as in `structure`. See docs/surgery.md.

        Raises:
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.
            VerificationError: The result would not have been (or was not) as promised; everything is as before.
        """
        if compensate:
            raise SurgeryError(
                "Compensation by the remaining units is not available yet. Pass compensate=False: the consumers then "
                "see zero in the units' place."
            )
        receipt, log = surgery.remove_units(
            self._tracker, units, self._optimizers, self._followers, dry_run=dry_run, verify=verify
        )
        if log is not None:
            self._undo = log
        return receipt

    def prune_neurons(
        self,
        neurons: Iterable[int] | Mapping[str, Sequence[int]],
        compensate: bool = True,
        *,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Remove neurons in place: ids, or {layer name: local indices}.

        Raises:
            UnknownNeuronError: No neuron has such an id.
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.
        """
        current = self._tracker.current
        places: list[tuple[str, int]] = []
        if isinstance(neurons, Mapping):
            for layer, indices in neurons.items():
                size = len(current.layers[layer_named(list(current.layers), layer)].ids)
                wrong = [i for i in indices if not isinstance(i, int) or not 0 <= i < size]
                if wrong:
                    raise UnknownNeuronError(
                        f"Layer {layer!r} has no neuron {wrong[0]!r}: its local indices are 0 to {size - 1}."
                    )
                places += [(layer, i) for i in indices]
        else:
            for neuron in neurons:
                entry, index = self._tracker.registry.find(neuron)
                if current.layers.get(entry.layer) is not entry:
                    raise UnknownNeuronError(
                        f"Neuron {neuron} belongs to the model {entry.model!r}, not to {current.name!r}."
                    )
                places.append((entry.layer, index))
        units = surgery.units_of(self.structure, places)
        return self.prune_units(units, compensate, dry_run=dry_run, verify=verify)

    def undo(self) -> None:
        """Take the last change back, bit for bit: model, gradients, optimizer state, ids, statistics.

        Raises:
            SurgeryError: There is no change to take back.
        """
        if self._undo is None:
            raise SurgeryError("There is no change to undo: only the last one can be taken back.")
        self._undo.undo()
        self._undo = None

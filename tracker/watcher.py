"""The part of the facade that looks: identity, observation, analysis and history."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tracker import analyzer
from tracker.analyzer import LayerFindings
from tracker.calls import ExampleInputs
from tracker.checks import checked
from tracker.errors import StatisticsError, UnknownNeuronError
from tracker.history import TrainingHistory
from tracker.identity import NeuronId, named
from tracker.observation import Observation
from tracker.session import Session
from tracker.tracker import ActivationTracker, TrackedModel

PathLike = str | os.PathLike[str]
Findings = Mapping[str, LayerFindings]


@checked(
    StatisticsError,
    itself=("model", "epoch", "train_loss", "train_acc"),
    neuron_id=UnknownNeuronError,
)
class NeuronWatcher:
    """Watches every neuron of a model while it runs, and tells which ones matter. Holds no arithmetic.

    Calls speak of the current model: the last one that was tracked, or whose hooks were registered. Calls that begin
    with `print_`, and the two reports `generate_neuron_report` and `generate_pruning_recommendations`, print; all
    others are silent and return records.
    """

    def __init__(
        self,
        activation_threshold: float = 0.01,
        correlation_threshold: float = 0.9,
        *,
        observe: str = "reads",
    ) -> None:
        if not activation_threshold >= 0:
            raise StatisticsError(
                f"activation_threshold is a magnitude, 0 or larger, not {activation_threshold!r}."
            )
        if not 0 < correlation_threshold <= 1:
            raise StatisticsError(
                f"correlation_threshold is in (0, 1], not {correlation_threshold!r}."
            )
        self._activation_threshold = activation_threshold
        self.correlation_threshold = correlation_threshold
        self._tracker = ActivationTracker(activation_threshold, observe)
        self._sessions: dict[TrackedModel, Session] = {}
        self._loaded: TrainingHistory | None = None  # before the first model was tracked
        self._cache: tuple[object, Observation, Findings] | None = None

    @property
    def activation_threshold(self) -> float:
        """A neuron fires where |activation| is larger. What was counted cannot be counted anew: fixed for life."""
        return self._activation_threshold

    # Identity

    def track_model(
        self,
        model: nn.Module,
        name: str = "model",
        example_inputs: ExampleInputs | None = None,
        *,
        axes: Mapping[str, int] | None = None,
        batch_dim: int = 0,
        assume_unread: Collection[str] = (),
    ) -> dict[str, list[int]]:
        """Give every neuron of `model` an id, and make it the current model.

        Args:
            model: Any module; wrappers of `torch.compile` and data parallelism are looked through. One of
                DistributedDataParallel refuses to run once its module was changed, until `tracker.renew` makes it anew.
            name: What reports call it.
            example_inputs: A tuple of positional arguments, a dict of keyword arguments, one tensor, a `Call`, or a
                list of several such calls. With them the width of custom modules is known at once; else their neurons
                get ids at the first forward pass, which is then the example.
            axes: Layer name → dimension of its output that counts its neurons, where the default is wrong.
            assume_unread: Names of modules (or parameters) that no example call runs and that never will be run: they
                are left as they are, whatever is removed. See docs/structure.md.
            batch_dim: Dimension of the model's first input that counts samples.

        Returns:
            {layer name: ids of its neurons}, in module order, as they are now: later changes leave it as it is. The
            same model again: the same ids.

        Raises:
            NotTrackedError: There is no layer with neurons, or the module runs no hooks.
            StructureError: The forward pass with the example inputs failed.
        """
        entry = self._tracker.track(model, name, example_inputs, axes, batch_dim, assume_unread)
        self._met(model, self._session)
        return {name: named(layer.ids) for name, layer in entry.layers.items()}

    def _met(self, model: nn.Module, session: Session) -> None:
        """For those who want to know what was tracked, wrappers and all."""

    def get_neuron_info(self, neuron_id: int) -> tuple[str, int]:
        """(layer name, local index) of a neuron of any tracked model.

        Raises:
            UnknownNeuronError: No such neuron; of one that was removed it says when and why.
        """
        entry, index = self._tracker.registry.find(neuron_id)
        return entry.layer, index

    def get_summary(self) -> dict[str, Any]:
        """The current model in numbers: neurons, layers, their sizes and types."""
        entry = self._tracker.current
        kinds = {site.name: site.kind for site in entry.observer.sites}
        sizes = {name: len(ids.ids) for name, ids in entry.layers.items()}
        types = [kinds[name] for name in sizes]
        return {
            "model_name": entry.name,
            "total_neurons": sum(sizes.values()),
            "total_layers": len(sizes),
            "layers": sizes,
            "layer_types": {kind: types.count(kind) for kind in dict.fromkeys(types)},
            "activation_threshold": self.activation_threshold,
            "correlation_threshold": self.correlation_threshold,
        }

    # Observation

    def register_activation_hooks(self, model: nn.Module | None = None) -> None:
        """Put the hooks on a tracked model and make it the current one. They do nothing until `start_tracking`.

        Register before `torch.compile`: graphs that were compiled earlier are compiled anew.
        """
        self._tracker.hook(model)

    def clear_hooks(self) -> None:
        """Take the hooks off the current model; its statistics stay readable."""
        self._tracker.current.detach()

    def start_tracking(
        self,
        enable_correlation_analysis: bool = False,
        mode: str | None = None,
        *,
        every: int = 1,
        layers: str | Collection[str] | None = None,
        correlation_every: int = 1,
    ) -> None:
        """Begin a fresh window of statistics; hooks are registered if they are not yet.

        Args:
            enable_correlation_analysis: Stream the covariance of each layer as well (neurons² numbers a layer).
            mode: Which passes the reports speak of: those of the model in "train" mode, in "eval" mode, or "all"
                mixed. None: the mode of the first pass. What the other mode shows is kept apart.
            every: Observe one pass of so many, of each mode the first one first; the others are not counted.
            layers: Names of the layers to observe. None: all.
            correlation_every: Take one row of so many into the covariance, each time others; see docs/observation.md.

        Raises:
            StatisticsError: `mode`, `every` or `correlation_every` makes no sense.
            NotTrackedError: The model has no layer of that name.
        """
        self._tracker.start(enable_correlation_analysis, mode, every, layers, correlation_every)

    def stop_tracking(self) -> None:
        """Record no more. The window stays readable until the next one begins."""
        self._tracker.stop()

    def padding_mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """`with engine.padding_mask(mask): model(x)` leaves padding out. mask: (batch, positions), True where real."""
        return self._tracker.masking(mask)

    def get_neuron_stats(self, neuron_id: int) -> dict[str, Any]:
        """Statistics of one neuron in the current window, as plain numbers; NaN where it was not observed.

        Raises:
            UnknownNeuronError: The current model has no such neuron.
        """
        entry, slot = self._tracker.registry.find(neuron_id)
        observation, findings = self._findings()
        current = self._tracker.current
        if current.layers.get(entry.layer) is not entry:
            raise StatisticsError(
                f"Neuron {neuron_id} belongs to the model {entry.model!r}; the current one is {current.name!r}. "
                "register_activation_hooks(model) makes another model the current one."
            )
        return analyzer.neuron_statistics(findings[entry.layer], slot, observation.samples)

    def get_dataset_statistics(self) -> dict[int, dict[str, Any]]:
        """{neuron id: statistics} of all neurons that were observed."""
        observation, findings = self._findings()
        return {
            NeuronId(neuron): analyzer.neuron_statistics(found, slot, observation.samples)
            for found in findings.values()
            for slot, neuron in enumerate(found.layer.ids)
            if found.observed[slot] or found.unreliable[slot]
        }

    def get_layer_summary(self) -> dict[str, dict[str, Any]]:
        """{layer name: numbers of the layer}; a layer that was not observed says so under "problem"."""
        _, findings = self._findings()
        return {name: analyzer.layer_statistics(found) for name, found in findings.items()}

    # Findings

    def get_dead_neurons(self) -> dict[str, list[int]]:
        """{layer name: ids of its neurons that never fired}, for all layers that were observed.

        `prune_neurons` and `recycle_neurons` take it as it is.
        """
        _, findings = self._findings()
        return {
            name: named(found.layer.ids[slot] for slot in found.dead.nonzero().flatten().tolist())
            for name, found in findings.items()
            if found.observed.any()
        }

    def find_redundant_neurons(
        self, correlation_threshold: float | None = None
    ) -> dict[str, list[tuple[int, int, float]]]:
        """{layer name: [(id, id, correlation), …]}: all pairs with |correlation| ≥ threshold.

        Raises:
            StatisticsError: The window did not observe correlation.
        """
        threshold = self._threshold(correlation_threshold)
        return {
            name: [
                (NeuronId(found.layer.ids[i]), NeuronId(found.layer.ids[j]), r)
                for i, j, r in found.pairs(threshold)
            ]
            for name, found in self._correlated().items()
        }

    def get_redundancy_summary(
        self, correlation_threshold: float | None = None
    ) -> dict[str, dict[str, Any]]:
        """{layer name: pairs, rate (pairs / all pairs), range of correlations}."""
        threshold = self._threshold(correlation_threshold)
        return {
            name: analyzer.redundancy_statistics(found, threshold)
            for name, found in self._correlated().items()
        }

    def get_explained_shares(self) -> dict[str, dict[int, float]]:
        """{layer name: {neuron id: share of its variance that all others of its layer explain}}.

        The squared multiple correlation: 1.0 for a neuron that the others determine, even where no single one repeats
        it. NaN for constant neurons. Needs a window with correlation.
        """
        shares = {}
        for name, found in self._correlated().items():
            values = analyzer.explained_shares(found)
            shares[name] = dict(zip(named(found.layer.ids), values, strict=True))
        return shares

    # History

    @property
    def history(self) -> TrainingHistory:
        """The logged epochs of the current model (or what was loaded, without one)."""
        if self._tracker.models:
            return self._session.history
        self._loaded = self._loaded or TrainingHistory(self.activation_threshold)
        return self._loaded

    def log_epoch_statistics(
        self, epoch: int, train_loss: float | None = None, train_acc: float | None = None
    ) -> None:
        """Remember the current window, and the epoch's loss and accuracy, in the history.

        Raises:
            StatisticsError: Nothing was observed since `start_tracking`.
        """
        observation, findings = self._findings()
        if not any(found.observed.any() for found in findings.values()):
            raise StatisticsError(
                f"Epoch {epoch!r} cannot be logged: no activation was observed since start_tracking. Call "
                "start_tracking() before the epoch's forward passes."
            )
        self.history.log(observation, epoch, train_loss, train_acc)

    def save_training_history(self, path: PathLike) -> Path:
        """Write the history as JSON."""
        return self.history.save(path)

    def load_training_history(self, path: PathLike) -> TrainingHistory:
        """Read a history back in place of the current one; a file that is none changes nothing.

        Raises:
            StatisticsError: The file is missing, broken, or foreign.
        """
        loaded = TrainingHistory.load(path)
        if self._tracker.models:
            self._session.history = loaded
        else:
            self._loaded = loaded
        return loaded

    def get_neuron_evolution(self, neuron_id: int) -> dict[str, list[Any]]:
        """Lists over the logged epochs: `epochs`, `mean`, `variance`, `frequency`, `loss`, `accuracy`."""
        return self.history.evolution(neuron_id)

    # Wiring

    def _findings(self) -> tuple[Observation, Findings]:
        key = self._window()
        if self._cache is None or self._cache[0] != key:
            observation = self._tracker.observe()
            self._cache = (key, observation, analyzer.analyse(observation))
        return self._cache[1:]

    def _window(self) -> object:
        """A key of all that is observed now: equal keys, equal findings."""
        current = self._tracker.current
        return (current, current.observer.version, current.mode, len(current.layers))

    def _correlated(self) -> Findings:
        """Findings of the layers whose correlation was observed."""
        _, findings = self._findings()
        if not self._tracker.current.correlated:
            raise StatisticsError(
                "Correlation was not observed. Begin the window with "
                "start_tracking(enable_correlation_analysis=True)."
            )
        return {n: found for n, found in findings.items() if found.layer.covariance is not None}

    def _require_observed(self, findings: Findings) -> None:
        if not any(found.observed.any() for found in findings.values()):
            raise StatisticsError(
                "No activation was observed. Call start_tracking(), run the model, then ask again."
            )

    def _threshold(self, given: float | None) -> float:
        threshold = self.correlation_threshold if given is None else given
        if not 0 <= threshold <= 1:
            raise StatisticsError(
                f"A threshold of |correlation| is between 0 and 1, not {threshold!r}."
            )
        return threshold

    @property
    def _session(self) -> Session:
        """All that belongs to the current model."""
        return self._session_of(self._tracker.current)

    def _session_of(self, entry: TrackedModel) -> Session:
        if entry not in self._sessions:
            history = self._loaded or TrainingHistory(self.activation_threshold)
            self._sessions[entry], self._loaded = Session(self._tracker, entry, history), None
        return self._sessions[entry]

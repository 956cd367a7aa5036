"""The part of an engine that looks: which neurons there are, and when they are observed."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tracker.analyzer import Analyzer
from tracker.inputs.calls import ExampleInputs
from tracker.modules.names import ByLayer, LayerOrName
from tracker.observation.neuron_ids import named
from tracker.parts.sessions import Sessions
from tracker.tracker import ActivationTracker


class Watcher:
    """Gives neurons their ids, and says what is observed.

    Args:
        tracker: Holds models, ids and hooks.
        sessions: What is kept of each model.
        analyzer: Tells its threshold in `get_summary`.
    """

    def __init__(self, tracker: ActivationTracker, sessions: Sessions, analyzer: Analyzer) -> None:
        self._tracker = tracker
        self._sessions = sessions
        self._analyzer = analyzer

    def track_model(
        self,
        model: nn.Module,
        name: str = "model",
        example_inputs: ExampleInputs | None = None,
        *,
        axes: ByLayer[int] | None = None,
        batch_dim: int = 0,
        assume_unread: Collection[LayerOrName] = (),
    ) -> dict[str, list[int]]:
        """Give every neuron of `model` an id, and make it the current model.

        Args:
            model: Any module; wrappers of `torch.compile` and data parallelism are looked through. One of
                DistributedDataParallel refuses to run once its module was changed, until `tracker.renew` makes it anew.
            name: What reports call it.
            example_inputs: A tuple of positional arguments, a dict of keyword arguments, one tensor, a `Call`, or a
                list of several such calls. With them the width of custom modules is known at once; else their neurons
                get ids at the first forward pass, which is then the example.
            axes: Layer, or its name → dimension of its output that counts its neurons, where the default is wrong.
            assume_unread: Names of modules (or parameters) that no example call runs and that never will be run: they
                are left as they are, whatever is removed. See docs/structure.md.
            batch_dim: Dimension of the model's first input that counts samples.

        Returns:
            {layer name: ids of its neurons}, in module order, as they are now: later changes leave it as it is. The
            same model again: the same ids.

        Raises:
            NotTrackedError: There is no layer with neurons, or the module runs no hooks.
            StructureError: The forward pass with the example inputs failed.

        Examples:
            >>> other = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
            >>> engine.track_model(other, "other", example_inputs=x)  # ids go on behind those of the first model
            {'0': [17, 18], '2': [19]}
        """
        entry = self._tracker.track(model, name, example_inputs, axes, batch_dim, assume_unread)
        self._sessions.meet(model)
        return {name: named(layer.ids) for name, layer in entry.layers.items()}

    def get_neuron_info(self, neuron_id: int) -> tuple[str, int]:
        """(layer name, local index) of a neuron of any tracked model.

        Args:
            neuron_id: Of any tracked model.

        Raises:
            UnknownNeuronError: No such neuron; of one that was removed it says when and why.

        Examples:
            >>> engine.get_neuron_info(9)  # layer, and place in it
            ('2', 1)
        """
        entry, index = self._tracker.registry.find(neuron_id)
        return entry.layer, index

    def get_summary(self) -> dict[str, Any]:
        """The current model in numbers: neurons, layers, their sizes and types.

        Examples:
            >>> engine.get_summary()["layers"]
            {'0': 8, '2': 6, '4': 3}
        """
        entry = self._tracker.current
        kinds = {point.name: point.kind for point in entry.observer.points}
        sizes = {name: len(ids.ids) for name, ids in entry.layers.items()}
        types = [kinds[name] for name in sizes]
        return {
            "model_name": entry.name,
            "total_neurons": sum(sizes.values()),
            "total_layers": len(sizes),
            "layers": sizes,
            "layer_types": {kind: types.count(kind) for kind in dict.fromkeys(types)},
            "activation_threshold": self._tracker.threshold,
            "correlation_threshold": self._analyzer.correlation_threshold,
        }

    # Observation

    def register_activation_hooks(self, model: nn.Module | None = None) -> None:
        """Put the hooks on a tracked model and make it the current one. They do nothing until `start_tracking`.

        Register before `torch.compile`: graphs that were compiled earlier are compiled anew.

        Args:
            model: A tracked one; None: the current one.

        Examples:
            >>> engine.register_activation_hooks(model)  # start_tracking does so too
        """
        self._tracker.hook(model)

    def clear_hooks(self) -> None:
        """Take the hooks off the current model; its statistics stay readable.

        Examples:
            >>> engine.clear_hooks()
            >>> engine.get_neuron_stats(0)["total_samples"]  # what was seen stays
            64
        """
        self._tracker.current.detach()

    def start_tracking(
        self,
        enable_correlation_analysis: bool = False,
        mode: str | None = None,
        *,
        every: int = 1,
        layers: LayerOrName | Collection[LayerOrName] | None = None,
        correlation_every: int = 1,
    ) -> None:
        """Begin a fresh window of statistics; hooks are registered if they are not yet.

        Args:
            enable_correlation_analysis: Stream the covariance of each layer as well (neurons² numbers a layer).
            mode: Which passes the reports speak of: those of the model in "train" mode, in "eval" mode, or "all"
                mixed. None: the mode of the first pass. What the other mode shows is kept apart.
            every: Observe one pass of so many, of each mode the first one first; the others are not counted.
            layers: The layers to observe, or their names. None: all.
            correlation_every: Take one row of so many into the covariance, each time others; see docs/observation.md.

        Raises:
            StatisticsError: `mode`, `every` or `correlation_every` makes no sense.
            NotTrackedError: The model has no layer of that name.

        Examples:
            >>> engine.start_tracking(mode="eval", every=2)  # every second pass
            >>> for batch in x.split(16):
            ...     _ = model.eval()(batch)
            >>> engine.get_neuron_stats(0)["total_samples"]
            32
        """
        self._tracker.start(enable_correlation_analysis, mode, every, layers, correlation_every)

    def stop_tracking(self) -> None:
        """Record no more. The window stays readable until the next one begins.

        Examples:
            >>> engine.start_tracking()
            >>> engine.stop_tracking()
            >>> _ = model(x)  # not observed
            >>> engine.get_neuron_stats(0)["total_samples"]
            0
        """
        self._tracker.stop()

    def padding_mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """`with engine.padding_mask(mask): model(x)` leaves padding out. mask: (batch, positions), True where real.

        Args:
            mask: (batch, positions), true where a token is real.

        Examples:
            >>> tokens, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, True, False, False, False]])
            >>> engine.start_tracking()
            >>> with engine.padding_mask(mask):
            ...     _ = model(tokens)
            >>> engine.get_neuron_stats(0)["observations"]  # positions that are no padding
            7
        """
        return self._tracker.masking(mask)

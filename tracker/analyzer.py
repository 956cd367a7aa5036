"""The part of an engine that judges: statistics of the current window, and which neurons stand out in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracker.analysis import findings as of_layers
from tracker.analysis.findings import LayerFindings
from tracker.analysis.plasticity import DORMANT, plasticity
from tracker.errors import StatisticsError
from tracker.observation.neuron_ids import NeuronId, named
from tracker.observation.records import Observation
from tracker.tracker import ActivationTracker

Findings = Mapping[str, LayerFindings]


class Analyzer:
    """Findings of the current model's window, made once for each state of it.

    Args:
        tracker: What observes.
        correlation_threshold: |Pearson correlation| from which on two neurons are redundant, in (0, 1].

    Raises:
        StatisticsError: It is not in that interval.
    """

    def __init__(self, tracker: ActivationTracker, correlation_threshold: float = 0.9) -> None:
        self._tracker = tracker
        self.correlation_threshold = correlation_threshold
        self._cache: tuple[object, Observation, Findings] | None = None

    @property
    def correlation_threshold(self) -> float:
        """|Pearson correlation| from which on two neurons are redundant, in (0, 1]."""
        return self._correlation_threshold

    @correlation_threshold.setter
    def correlation_threshold(self, threshold: float) -> None:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= 1:
            raise StatisticsError(f"correlation_threshold is in (0, 1], not {threshold!r}.")
        self._correlation_threshold = threshold

    def get_neuron_stats(self, neuron_id: int) -> dict[str, Any]:
        """Statistics of one neuron in the current window, as plain numbers; NaN where it was not observed.

        Args:
            neuron_id: Of a neuron of the current model.

        Raises:
            UnknownNeuronError: The current model has no such neuron.

        Examples:
            >>> stats = engine.get_neuron_stats(0)
            >>> stats["layer_name"], stats["observations"], stats["status"]
            ('0', 64, 'active')
        """
        entry, slot = self._tracker.registry.find(neuron_id)
        observation, findings = self.findings()
        current = self._tracker.current
        if current.layers.get(entry.layer) is not entry:
            raise StatisticsError(
                f"Neuron {neuron_id} belongs to the model {entry.model!r}; the current one is {current.name!r}. "
                "register_activation_hooks(model) makes another model the current one."
            )
        return of_layers.neuron_statistics(findings[entry.layer], slot, observation.samples)

    def get_dataset_statistics(self) -> dict[int, dict[str, Any]]:
        """{neuron id: statistics} of all neurons that were observed.

        Examples:
            >>> stats = engine.get_dataset_statistics()
            >>> len(stats), 0 <= stats[16]["firing_frequency"] <= 1
            (17, True)
        """
        observation, findings = self.findings()
        return {
            NeuronId(neuron): of_layers.neuron_statistics(found, slot, observation.samples)
            for found in findings.values()
            for slot, neuron in enumerate(found.layer.ids)
            if found.observed[slot] or found.unreliable[slot]
        }

    def get_layer_summary(self) -> dict[str, dict[str, Any]]:
        """{layer name: numbers of the layer}; a layer that was not observed says so under "problem".

        Examples:
            >>> engine.get_layer_summary()["0"]["dead_percentage"]
            0.0
        """
        _, findings = self.findings()
        return {name: of_layers.layer_statistics(found) for name, found in findings.items()}

    # Findings

    def get_dead_neurons(self) -> dict[str, list[int]]:
        """{layer name: ids of its neurons that never fired}, for all layers that were observed.

        `prune_neurons` and `recycle_neurons` take it as it is.

        Examples:
            >>> with torch.no_grad():
            ...     _ = model[0].weight[3].zero_(), model[0].bias[3].fill_(-1)
            >>> engine.start_tracking()
            >>> _ = model(x)
            >>> engine.get_dead_neurons()["0"]
            [3]
        """
        _, findings = self.findings()
        return {
            name: named(found.layer.ids[slot] for slot in found.dead.nonzero().flatten().tolist())
            for name, found in findings.items()
            if found.observed.any()
        }

    def find_redundant_neurons(
        self, correlation_threshold: float | None = None
    ) -> dict[str, list[tuple[int, int, float]]]:
        """{layer name: [(id, id, correlation), …]}: all pairs with |correlation| ≥ threshold.

        Args:
            correlation_threshold: |correlation| from which on two neurons are redundant; None: the engine's.

        Raises:
            StatisticsError: The window did not observe correlation.

        Examples:
            >>> pairs = engine.find_redundant_neurons(correlation_threshold=0.5)  # layer -> (id, id, correlation)
            >>> all(abs(correlation) >= 0.5 for _, _, correlation in pairs["0"])
            True
        """
        threshold = self.threshold(correlation_threshold)
        return {
            name: [
                (NeuronId(found.layer.ids[i]), NeuronId(found.layer.ids[j]), r)
                for i, j, r in found.pairs(threshold)
            ]
            for name, found in self.correlated().items()
        }

    def get_redundancy_summary(
        self, correlation_threshold: float | None = None
    ) -> dict[str, dict[str, Any]]:
        """{layer name: pairs, rate (pairs / all pairs), range of correlations}.

        Args:
            correlation_threshold: |correlation| from which on two neurons are redundant; None: the engine's.

        Examples:
            >>> engine.get_redundancy_summary(0.99)["0"]["redundant_pairs"]
            0
        """
        threshold = self.threshold(correlation_threshold)
        return {
            name: of_layers.redundancy_statistics(found, threshold)
            for name, found in self.correlated().items()
        }

    def get_explained_shares(self) -> dict[str, dict[int, float]]:
        """{layer name: {neuron id: share of its variance that all others of its layer explain}}.

        The squared multiple correlation: 1.0 for a neuron that the others determine, even where no single one repeats
        it. NaN for constant neurons. Needs a window with correlation.

        Examples:
            >>> shares = engine.get_explained_shares()["0"]  # id -> how much of it the others of its layer explain
            >>> sorted(shares) == list(range(8)) and max(shares.values()) <= 1
            True
        """
        shares = {}
        for name, found in self.correlated().items():
            values = of_layers.explained_shares(found)
            shares[name] = dict(zip(named(found.layer.ids), values, strict=True))
        return shares

    def get_plasticity_summary(
        self, dormant_threshold: float = DORMANT
    ) -> dict[str, dict[str, Any]]:
        """{layer name: dormant neurons and their share, effective rank of the features}, as plain numbers.

        A neuron is dormant where its mean |activation| is at most so much of its layer's (Sokar et al., 2023); in
        layers with neurons of both signs the root mean square stands for it ("dormant_measure" says which). The
        effective rank (Roy & Vetterli, 2007) needs a window with correlation; else it is None.

        Args:
            dormant_threshold: Score up to which a neuron is dormant.

        Raises:
            StatisticsError: The threshold is below 0, or no number.

        Examples:
            >>> engine.get_plasticity_summary(dormant_threshold=0.0)["0"]["dormant_share"]
            0.0
        """
        _, findings = self.findings()
        return {name: plasticity(found, dormant_threshold) for name, found in findings.items()}

    def findings(self) -> tuple[Observation, Findings]:
        """What was observed, and what is found in it, by layer."""
        key = self.window()
        if self._cache is None or self._cache[0] != key:
            observation = self._tracker.observe()
            self._cache = (key, observation, of_layers.analyse(observation))
        return self._cache[1:]

    def window(self) -> object:
        """A key of all that is observed now: equal keys, equal findings."""
        current = self._tracker.current
        return (current, current.observer.version, current.mode, len(current.layers))

    def correlated(self) -> Findings:
        """Findings of the layers whose correlation was observed."""
        _, findings = self.findings()
        if not self._tracker.current.correlated:
            raise StatisticsError(
                "Correlation was not observed. Begin the window with "
                "start_tracking(enable_correlation_analysis=True)."
            )
        return {n: found for n, found in findings.items() if found.layer.covariance is not None}

    def require_observed(self, findings: Findings) -> None:
        """Raise StatisticsError where nothing was observed."""
        if not any(found.observed.any() for found in findings.values()):
            raise StatisticsError(
                "No activation was observed. Call start_tracking(), run the model, then ask again."
            )

    def threshold(self, given: float | None) -> float:
        """The given threshold of |correlation|, or the default one."""
        threshold = self.correlation_threshold if given is None else given
        if not 0 <= threshold <= 1:
            raise StatisticsError(
                f"A threshold of |correlation| is between 0 and 1, not {threshold!r}."
            )
        return threshold

"""The part of the facade that tells: recommendations, reports and pictures of what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker import figures, recommend, reporter
from tracker.checks import checked
from tracker.errors import StatisticsError
from tracker.files import picture, write_together
from tracker.history import write_json
from tracker.identity import layer_named
from tracker.observation import Observation
from tracker.text import plain
from tracker.watcher import NeuronWatcher, PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked(StatisticsError)
class NeuronAdviser(NeuronWatcher):
    """Tells what was seen, and what it suggests to change. Holds no arithmetic."""

    _recommendations: tuple[object, dict[str, Any]] | None = None  # of which window, and what

    # Recommendations

    def generate_optimization_recommendations(
        self,
        pruning_threshold: float = 0.01,
        redundancy_threshold: float | None = None,
        saturation_threshold: float = 0.95,
    ) -> dict[str, Any]:
        """What to prune, merge and expand, as plain data (JSON Schema: tracker/schemas).

        With correlation observed, also what each removal is predicted to change once the others take over, and
        neurons that several others together explain exactly.

        Args:
            pruning_threshold: Firing frequency below which a neuron is recommended to be pruned.
            redundancy_threshold: |correlation| from which on a pair is recommended to be merged.
            saturation_threshold: Share of its neurons that its consumers need from which on a layer is recommended to
                be expanded; where correlation was not observed, average firing frequency.
        """
        redundancy = self._threshold(redundancy_threshold)
        observation, findings = self._findings()
        self._require_observed(findings)
        thresholds = recommend.Thresholds(pruning_threshold, redundancy, saturation_threshold)
        recommendations = recommend.recommend(observation, findings, thresholds)
        self._foretell(observation, recommendations)
        self._recommendations = (self._window(), recommendations)
        return recommendations

    def _foretell(self, observation: Observation, advice: dict[str, Any]) -> None:
        """For those who know what would change: they add it to the advice."""

    def save_optimization_recommendations(self, path: PathLike, **thresholds: float) -> Path:
        """Write the recommendations as JSON: the window's last ones, or new ones where `thresholds` are given."""
        return write_json(path, self._current_recommendations(thresholds))

    def print_optimization_recommendations(self, **thresholds: float) -> None:
        """Print the recommendations for people."""
        print(reporter.optimization_report(self._current_recommendations(thresholds)))

    def generate_pruning_recommendations(self, top_n: int = 10) -> list[dict[str, Any]]:
        """Print and return the `top_n` least useful neurons of the hidden layers."""
        reporter.require_count("top_n", top_n)
        _, findings = self._findings()
        self._require_observed(findings)
        candidates = recommend.pruning_candidates(findings)[:top_n]
        print(reporter.pruning_report(candidates, top_n))
        return candidates

    # Reports

    def print_activation_summary(self, limit: int | None = 10) -> None:
        """Print one line for each neuron: the first `limit` of each layer, None for all."""
        reporter.require_count("limit", limit)
        print(reporter.activation_summary(*self._findings(), limit))

    def print_dataset_summary(self) -> None:
        """Print dead neurons and firing, layer by layer."""
        print(reporter.dataset_summary(*self._findings()))

    def print_correlation_analysis(self, correlation_threshold: float | None = None) -> None:
        """Print the redundant pairs of every layer."""
        threshold = self._threshold(correlation_threshold)
        observation, _ = self._findings()
        print(reporter.correlation_report(observation, self._correlated(), threshold))

    def generate_neuron_report(
        self, show_heatmap: bool = True, save_heatmap: PathLike | None = None, top_n: int = 10
    ) -> str:
        """Print and return the activity report; show the heatmap where there is a window, save it where asked."""
        reporter.require_count("top_n", top_n)
        text = self._activity_report(top_n)
        print(text)
        if save_heatmap is not None or show_heatmap:
            figure = self.plot_activity_heatmap(save_heatmap)
            if show_heatmap:
                figures.show(figure)
        return text

    def save_report_to_file(self, path: PathLike, include_heatmap: bool = True) -> Path:
        """Write all reports into one text file, and the heatmap beside it (NAME_heatmap.png).

        Raises:
            WriteError: One of them cannot be written; neither was.
        """
        target = Path(path)
        observation, findings = self._findings()
        parts = [self._activity_report(top_n=10), reporter.dataset_summary(observation, findings)]
        if any(f.layer.covariance is not None for f in findings.values()):
            correlated = self._correlated()
            parts.append(
                reporter.correlation_report(observation, correlated, self.correlation_threshold)
            )
        parts.append(reporter.optimization_report(self._current_recommendations({})))
        files: dict[PathLike, bytes] = {}
        if include_heatmap:
            beside = target.parent / f"{target.stem}_heatmap.png"
            files[beside] = picture(figures.activity_heatmap(observation, findings), beside)
            parts.append(f"Activity heatmap: {plain(beside.name)}")
        files[target] = ("\n\n\n".join(parts) + "\n").encode()
        write_together(files)
        return target

    def plot_activity_heatmap(self, path: PathLike | None = None) -> Figure:
        """Firing and mean activation of every neuron, layer by layer; saved to `path` if given."""
        return figures.save(figures.activity_heatmap(*self._findings()), path)

    def plot_correlation_matrix(self, layer_name: str, path: PathLike | None = None) -> Figure:
        """Clustered correlation matrix of one layer; saved to `path` if given."""
        _, findings = self._findings()
        found = findings[layer_named(list(findings), layer_name)]
        return figures.save(figures.correlation_matrix(found, self.correlation_threshold), path)

    def plot_evolution(self, path: PathLike | None = None) -> Figure:
        """Loss, accuracy and firing over the logged epochs; saved to `path` if given."""
        return figures.save(figures.evolution(self.history), path)

    # Wiring

    def _activity_report(self, top_n: int) -> str:
        observation, findings = self._findings()
        self._require_observed(findings)
        candidates = recommend.pruning_candidates(findings)
        return reporter.activity_report(
            observation, findings, candidates, self.correlation_threshold, top_n
        )

    def _current_recommendations(self, thresholds: dict[str, float]) -> dict[str, Any]:
        last = self._recommendations
        if thresholds or last is None or last[0] != self._window():
            return self.generate_optimization_recommendations(**thresholds)
        return last[1]

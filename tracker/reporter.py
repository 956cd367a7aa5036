"""The part of an engine that tells: recommendations, reports and pictures of what was found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.analysis.epoch_history import write_json
from tracker.analysis.plasticity import DORMANT
from tracker.analysis.recommendations import Thresholds, pruning_candidates, recommend
from tracker.analyzer import Analyzer
from tracker.errors import StatisticsError
from tracker.modules.names import LayerOrName, name_of
from tracker.observation.neuron_ids import layer_named
from tracker.observation.records import Observation
from tracker.parts.sessions import Sessions
from tracker.reporting import figures, html_page, text_reports
from tracker.reporting.plasticity_report import plasticity_report
from tracker.reporting.recommendations_view import Recommendations
from tracker.reporting.timeline import life
from tracker.surgery.transaction import count
from tracker.utils.files import picture, write_together
from tracker.utils.notebook import PrintedList, PrintedText
from tracker.utils.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]


class Reporter:
    """Tells what was found, and what it suggests to change.

    Args:
        analyzer: What finds.
        sessions: Histories, journals and runs of the models.
        predict: Adds to recommendations, in place, what each would change.
    """

    def __init__(
        self,
        analyzer: Analyzer,
        sessions: Sessions,
        predict: Callable[[Observation, dict[str, Any]], None],
    ) -> None:
        self._analyzer = analyzer
        self._sessions = sessions
        self._predict = predict
        self._recommendations: tuple[object, dict[str, Any]] | None = None  # of which window

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

        Examples:
            >>> advice = engine.generate_optimization_recommendations(pruning_threshold=0.05)
            >>> sorted(advice)
            ['expand', 'merge', 'metadata', 'prune', 'schema_version', 'statistics']
        """
        redundancy = self._analyzer.threshold(redundancy_threshold)
        observation, findings = self._analyzer.findings()
        self._analyzer.require_observed(findings)
        thresholds = Thresholds(pruning_threshold, redundancy, saturation_threshold)
        recommendations = Recommendations(recommend(observation, findings, thresholds))
        self._predict(observation, recommendations)
        self._recommendations = (self._analyzer.window(), recommendations)
        return recommendations

    def save_optimization_recommendations(self, /, path: PathLike, **thresholds: float) -> Path:
        """Write the recommendations as JSON: the window's last ones, or new ones where `thresholds` are given.

        Args:
            path: Where to write; what is there is replaced once the new file is whole.
            thresholds: Arguments of `generate_optimization_recommendations`.

        Examples:
            >>> engine.save_optimization_recommendations("advice.json", pruning_threshold=0.05).name
            'advice.json'
        """
        return write_json(path, self._current_recommendations(thresholds))

    def print_optimization_recommendations(self, /, **thresholds: float) -> None:
        """Print the recommendations for people.

        Args:
            thresholds: Arguments of `generate_optimization_recommendations`.

        Examples:
            >>> engine.print_optimization_recommendations()  # doctest: +ELLIPSIS
            OPTIMIZATION RECOMMENDATIONS
            ...
        """
        print(text_reports.optimization_report(self._current_recommendations(thresholds)))

    def generate_pruning_recommendations(self, top_n: int = 10) -> list[dict[str, Any]]:
        """Print and return the `top_n` least useful neurons of the hidden layers.

        Args:
            top_n: How many.

        Examples:
            >>> worst = engine.generate_pruning_recommendations(top_n=3)  # doctest: +ELLIPSIS
            TOP 3 PRUNING CANDIDATES:
            ...
            >>> len(worst)
            3
        """
        text_reports.require_count("top_n", top_n)
        _, findings = self._analyzer.findings()
        self._analyzer.require_observed(findings)
        candidates = pruning_candidates(findings)[:top_n]
        text = text_reports.pruning_report(candidates, top_n)
        print(text)
        return PrintedList(candidates, text)

    # Reports

    def print_activation_summary(self, limit: int | None = 10) -> None:
        """Print one line for each neuron: the first `limit` of each layer, None for all.

        Args:
            limit: Neurons of each layer; None: all.

        Examples:
            >>> engine.print_activation_summary(limit=2)  # doctest: +ELLIPSIS
            Activation Statistics Summary:
            ...
        """
        text_reports.require_count("limit", limit)
        print(text_reports.activation_summary(*self._analyzer.findings(), limit))

    def print_dataset_summary(self) -> None:
        """Print dead neurons and firing, layer by layer.

        Examples:
            >>> engine.print_dataset_summary()  # doctest: +ELLIPSIS
            DATASET-LEVEL NEURON ANALYSIS REPORT
            ...
        """
        print(text_reports.dataset_summary(*self._analyzer.findings()))

    def print_correlation_analysis(self, correlation_threshold: float | None = None) -> None:
        """Print the redundant pairs of every layer.

        Args:
            correlation_threshold: |correlation| from which on two neurons are redundant; None: the engine's.

        Examples:
            >>> engine.print_correlation_analysis(0.8)  # doctest: +ELLIPSIS
            NEURON CORRELATION ANALYSIS REPORT
            ...
        """
        threshold = self._analyzer.threshold(correlation_threshold)
        observation, _ = self._analyzer.findings()
        print(text_reports.correlation_report(observation, self._analyzer.correlated(), threshold))

    def print_plasticity_report(self, dormant_threshold: float = DORMANT) -> None:
        """Print dormant neurons, effective ranks and ages of every layer; see `get_plasticity_summary`.

        Args:
            dormant_threshold: Score up to which a neuron is dormant.

        Examples:
            >>> engine.print_plasticity_report()  # doctest: +ELLIPSIS
            PLASTICITY...
        """
        print(self._plasticity_report(dormant_threshold))

    def generate_neuron_report(
        self, show_heatmap: bool = True, save_heatmap: PathLike | None = None, top_n: int = 10
    ) -> str:
        """Print and return the activity report; show the heatmap where there is a window, save it where asked.

        Args:
            show_heatmap: Whether the picture is shown, where there is a window or a notebook.
            save_heatmap: File for the picture; None: it is not saved.
            top_n: Candidates for pruning that are listed.

        Examples:
            >>> text = engine.generate_neuron_report(show_heatmap=False, top_n=3)  # doctest: +ELLIPSIS
            COMPREHENSIVE NEURON ACTIVITY REPORT
            ...
        """
        text_reports.require_count("top_n", top_n)
        report = self._activity_report(top_n)
        print(report)
        if save_heatmap is not None or show_heatmap:
            figure = self.plot_activity_heatmap(save_heatmap)
            if show_heatmap:
                figures.show(figure)
        return PrintedText(report)

    def save_report_to_file(self, path: PathLike, include_heatmap: bool = True) -> Path:
        """Write all reports into one text file, and the heatmap beside it (NAME_heatmap.png).

        Args:
            path: Where to write; what is there is replaced once the new file is whole.
            include_heatmap: Whether the picture is written beside it.

        Raises:
            WriteError: One of them cannot be written; neither was.

        Examples:
            >>> engine.save_report_to_file("report.txt", include_heatmap=False).name
            'report.txt'
        """
        target = Path(path)
        observation, findings = self._analyzer.findings()
        parts = [
            self._activity_report(top_n=10),
            text_reports.dataset_summary(observation, findings),
        ]
        if any(f.layer.covariance is not None for f in findings.values()):
            correlated = self._analyzer.correlated()
            parts.append(
                text_reports.correlation_report(
                    observation, correlated, self._analyzer.correlation_threshold
                )
            )
        parts.append(text_reports.optimization_report(self._current_recommendations({})))
        parts.append(self._plasticity_report(DORMANT))
        parts += text_reports.more_sections(observation, findings)
        files: dict[PathLike, bytes] = {}
        if include_heatmap:
            beside = target.parent / f"{target.stem}_heatmap.png"
            files[beside] = picture(figures.activity_heatmap(observation, findings), beside)
            parts.append(f"Activity heatmap: {plain(beside.name)}")
        files[target] = ("\n\n\n".join(parts) + "\n").encode()
        write_together(files)
        return target

    def plot_activity_heatmap(self, path: PathLike | None = None) -> Figure:
        """Firing and mean activation of every neuron, layer by layer; saved to `path` if given.

        Args:
            path: File for the picture; None: it is only returned.

        Examples:
            >>> figure = engine.plot_activity_heatmap("heatmap.png")
        """
        return figures.save(figures.activity_heatmap(*self._analyzer.findings()), path)

    def plot_correlation_matrix(
        self, layer_name: LayerOrName, path: PathLike | None = None
    ) -> Figure:
        """Clustered correlation matrix of one layer; saved to `path` if given.

        Args:
            layer_name: Of a layer that was observed with correlation, or the layer itself.
            path: File for the picture; None: it is only returned.

        Examples:
            >>> figure = engine.plot_correlation_matrix("0", "correlation.png")
        """
        _, findings = self._analyzer.findings()
        name = name_of(self._sessions.current.entry.model, layer_name)
        found = findings[layer_named(list(findings), name)]
        return figures.save(
            figures.correlation_matrix(found, self._analyzer.correlation_threshold), path
        )

    def plot_evolution(self, path: PathLike | None = None) -> Figure:
        """Loss, accuracy and firing over the logged epochs; saved to `path` if given.

        Args:
            path: File for the picture; None: it is only returned.

        Examples:
            >>> engine.log_epoch_statistics(0, train_loss=1.1, train_acc=0.4)
            >>> figure = engine.plot_evolution("evolution.png")
        """
        return figures.save(figures.evolution(self._sessions.history), path)

    def plot_life(self, path: PathLike | None = None) -> Figure:
        """Widths, births and deaths, loss and accuracy since `start_self_modification`; saved to `path` if given.

        Args:
            path: File for the picture; None: it is only returned.

        Raises:
            StatisticsError: There was no run, or no step of it.

        Examples:
            >>> engine.start_self_modification()
            >>> _ = engine.step(nn.functional.cross_entropy(model(x), y))
            >>> figure = engine.plot_life("life.png")
        """
        session = self._sessions.present
        run = None if session is None else session.run
        if session is None or run is None:
            raise StatisticsError(
                "There is no life to draw: the current model did not modify itself. Call start_self_modification first."
            )
        return figures.save(life(run, session.journal, session.entry.name), path)

    def save_html_report(self, path: PathLike) -> Path:
        """Write one self-contained HTML page: the run's life, layers, training, changes and decisions.

        Args:
            path: Where to write; what is there is replaced once the new file is whole.

        Examples:
            >>> engine.save_html_report("report.html").name
            'report.html'
        """
        observation, findings = self._analyzer.findings()
        session = self._sessions.current
        current = session.entry
        return html_page.write(
            html_page.Run(
                current.name,
                observation,
                findings,
                session.history,
                session.journal,
                count(current.model()),
                "" if current.structure is None else str(current.structure),
                session.run,
            ),
            path,
        )

    # Wiring

    def _plasticity_report(self, threshold: float) -> str:
        session = self._sessions.present
        run = None if session is None else session.run
        ages = {} if run is None else {n: list(a.values()) for n, a in run.ages().items()}
        return plasticity_report(self._analyzer.get_plasticity_summary(threshold), ages)

    def _activity_report(self, top_n: int) -> str:
        observation, findings = self._analyzer.findings()
        self._analyzer.require_observed(findings)
        candidates = pruning_candidates(findings)
        return text_reports.activity_report(
            observation, findings, candidates, self._analyzer.correlation_threshold, top_n
        )

    def _current_recommendations(self, thresholds: dict[str, float]) -> dict[str, Any]:
        last = self._recommendations
        if thresholds or last is None or last[0] != self._analyzer.window():
            return self.generate_optimization_recommendations(**thresholds)
        return last[1]

"""Findings -> text for people. Pure renderers: each returns a string and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tracker.analysis.findings import (
    LayerFindings,
    layer_statistics,
    neuron_statistics,
    redundancy_statistics,
)
from tracker.errors import StatisticsError
from tracker.observation.records import Observation
from tracker.utils.text import in_line, plain, short

WIDE, MIDDLE = 80, 60
MAX_PAIRS = 20  # shown for each layer; the totals count all

Section = Callable[[Observation, Mapping[str, LayerFindings]], str]
_SECTIONS: dict[str, Section] = {}


def register_section(title: str) -> Callable[[Section], Section]:
    """Register a section of `save_report_to_file`: it stands behind the others, under its title.

    Args:
        title: Of the section; the last function that was registered under it holds.

    Returns:
        A decorator for a function of (observation, findings by layer) that returns text, "" for none.

    Examples:
        >>> from tracker import register_section
        >>> @register_section("LARGEST MEANS")
        ... def largest_means(observation, findings):
        ...     return ", ".join(f"{name} {f.layer.activity.mean.max():.3f}" for name, f in findings.items())
    """

    def register(section: Section) -> Section:
        _SECTIONS[title] = section
        return section

    return register


def more_sections(observation: Observation, findings: Mapping[str, LayerFindings]) -> list[str]:
    """The texts of all registered sections."""
    found = {title: section(observation, findings) for title, section in _SECTIONS.items()}
    return [f"{plain(t)}\n{'=' * 80}\n{plain(text)}" for t, text in found.items() if text]


def activation_summary(
    observation: Observation, findings: Mapping[str, LayerFindings], limit: int | None
) -> str:
    """One line for each neuron: the first `limit` of each layer, or all."""
    head = (
        f"{'Neuron ID':<10} {'Layer':<15} {'Local Idx':<10} {'Mean':<12} {'Variance':<12} "
        f"{'Sparsity':<10} {'Batches':<8}"
    )
    lines = ["Activation Statistics Summary:", "=" * WIDE, head, "-" * WIDE]
    for found in findings.values():
        ids = found.layer.ids
        shown = ids if limit is None else ids[:limit]
        for slot, neuron in enumerate(shown):
            s = neuron_statistics(found, slot, observation.samples)
            lines.append(
                f"{neuron:<10} {_cut(found.layer.label, 15):<15} {slot:<10} {_num(s['mean']):<12} "
                f"{_num(s['variance']):<12} {_num(s['sparsity'], 3):<10} {s['batches']:<8}"
            )
        if len(shown) < len(ids):
            lines.append(
                f"{'':<10} {_cut(found.layer.label, 15):<15} ... and {len(ids) - len(shown)} more"
            )
    lines += ["-" * WIDE, _totals(observation, findings)]
    return _text(lines)


def dataset_summary(observation: Observation, findings: Mapping[str, LayerFindings]) -> str:
    """Dead neurons and firing, layer by layer."""
    rows = {name: layer_statistics(found) for name, found in findings.items()}
    lines = [
        "DATASET-LEVEL NEURON ANALYSIS REPORT",
        "=" * WIDE,
        *_sources(observation),
        "",
        "LAYER SUMMARY:",
        "-" * MIDDLE,
        f"{'Layer':<15} {'Total':<8} {'Dead':<6} {'Dead %':<8} {'Avg Freq':<10}",
        "-" * MIDDLE,
    ]
    for name, row in rows.items():
        total, dead = row["total_neurons"], row["dead_neurons"]
        lines.append(
            f"{_cut(findings[name].layer.label, 15):<15} {total:<8} {dead:<6} {_percent(dead, total):<8} "
            f"{_num(row['avg_firing_frequency'], 3):<10}"
        )
    total, dead = (sum(r[key] for r in rows.values()) for key in ("total_neurons", "dead_neurons"))
    lines += ["-" * MIDDLE, f"{'TOTAL':<15} {total:<8} {dead:<6} {_percent(dead, total):<8}"]
    lines += _detail("DEAD NEURONS DETAILS:", "dead", findings, lambda f: f.dead)
    lines += _detail(
        "CONSTANT NEURONS (not dead):", "constant", findings, lambda f: f.constant & ~f.dead
    )
    lines += _detail("NON-FINITE NEURONS:", "non-finite", findings, lambda f: f.unreliable)
    lines += _unobserved(findings)
    return _text(lines)


def correlation_report(
    observation: Observation, findings: Mapping[str, LayerFindings], threshold: float
) -> str:
    """Redundant pairs of every layer."""
    lines = [
        "NEURON CORRELATION ANALYSIS REPORT",
        "=" * WIDE,
        f"Correlation threshold: {threshold:g}",
        f"Samples used for correlation: {observation.samples}",
        *_sampled(findings, threshold),
        "",
        "REDUNDANT NEURON PAIRS BY LAYER:",
        "-" * MIDDLE,
        f"{'Layer':<15} {'Pairs':<8} {'Redundant Neurons':<30} {'Correlation':<12}",
        "-" * MIDDLE,
    ]
    detail, total = [], 0
    for name, found in findings.items():
        pairs = found.pairs(threshold)
        total += len(pairs)
        lines += _pair_rows(found.layer.label, pairs)
        if pairs:
            detail += _redundancy_detail(name or "(model)", redundancy_statistics(found, threshold))
    lines += ["-" * MIDDLE, f"Total redundant pairs: {total}"]
    if detail:
        lines += ["", "DETAILED REDUNDANCY ANALYSIS:", "-" * 50, *detail]
    constant = sum(int(f.constant.sum()) for f in findings.values())
    if constant:
        lines += ["", f"Constant neurons have no correlation and are in no pair: {constant}."]
    lines += _unobserved(findings)
    return _text(lines)


def _sampled(findings: Mapping[str, LayerFindings], threshold: float) -> list[str]:
    """How sure correlations of a sample of rows are: (1 - r²) / √(n - 1) (Fisher, 1915)."""
    shares = [
        (int(c.count.max()), int(f.layer.activity.observations.max()))
        for f in findings.values()
        if (c := f.layer.covariance) is not None and len(c.count)
    ]
    known = [(rows, rows / seen) for rows, seen in shares if seen and rows > 1]
    if not known or min(share for _, share in known) > 0.9:
        return []
    rows, share = min(known)
    error = (1 - threshold**2) / (rows - 1) ** 0.5
    return [
        f"Of a sample: {share:.1%} of the observations, {rows:,} at least; a correlation of {threshold:g} has a "
        f"standard error of {error:.1g}"
    ]


def activity_report(
    observation: Observation,
    findings: Mapping[str, LayerFindings],
    candidates: Sequence[Mapping[str, Any]],
    threshold: float,
    top_n: int = 10,
) -> str:
    """Most and least active neurons, layers, and candidates for pruning."""
    ranked = ranking(observation, findings)
    lines = ["COMPREHENSIVE NEURON ACTIVITY REPORT", "=" * WIDE, *_sources(observation), ""]
    lines += ["NEURON ACTIVITY ANALYSIS", "-" * 50, ""]
    lines += _ranking(f"TOP {top_n} MOST ACTIVE NEURONS (Key Contributors):", ranked[:top_n])
    ranked.sort(key=lambda row: (row[1]["firing_frequency"], row[0]))
    lines += _ranking(f"TOP {top_n} LEAST ACTIVE NEURONS:", ranked[:top_n])
    lines += _layer_table(findings, threshold)
    lines += ["PRUNING RECOMMENDATIONS", "-" * 40, pruning_report(candidates, top_n)]
    return _text([*lines, *_unobserved(findings)])


def require_count(name: str, value: int | None) -> None:
    """See that so many rows can be shown.

    Raises:
        StatisticsError: It is less than 0.
    """
    if value is not None and value < 0:
        raise StatisticsError(f"{name} is a number of rows, 0 or more, not {value!r}.")


def pruning_report(candidates: Sequence[Mapping[str, Any]], top_n: int) -> str:
    """The `top_n` least useful neurons, as `pruning_candidates` ranks them."""
    lines = [
        f"TOP {min(top_n, len(candidates))} PRUNING CANDIDATES:",
        f"{'Rank':<5} {'Neuron ID':<10} {'Layer':<15} {'Local Idx':<10} {'Status':<8} {'Score':<8} {'Frequency':<10}",
        "-" * WIDE,
    ]
    for rank, c in enumerate(candidates[:top_n], 1):
        lines.append(
            f"{rank:<5} {c['neuron_id']:<10} {_cut(c['layer_name'] or '(model)', 15):<15} {c['local_index']:<10} "
            f"{c['status']:<8} {c['score']:<8.3f} {c['firing_frequency']:<10.3f}"
        )
    if not candidates:
        lines.append("none: no hidden layer was observed")
    lines += [
        "",
        "Score = firing frequency * min(1, deviation / mean deviation of its layer); 0: useless.",
    ]
    return _text(lines)


def optimization_report(recommendations: Mapping[str, Any], limit: int = 10) -> str:
    """The recommendations for people."""
    info, counts = recommendations["metadata"]["model_info"], recommendations["statistics"]
    lines = [
        "OPTIMIZATION RECOMMENDATIONS",
        "=" * WIDE,
        f"Model: {_count(info['total_neurons'], 'neuron')} in {_count(info['total_layers'], 'layer')}",
        "",
        f"PRUNE: {_count(counts['total_prunable_neurons'], 'neuron')}",
    ]
    lines += _limited(
        (
            f"  neuron {c['neuron_id']} ({short(c['layer_name'])}[{c['local_index']}]): {c['reason']}, fires in "
            f"{c['firing_frequency']:.1%} of observations{_predicted(c)}"
            for c in recommendations["prune"]
        ),
        limit,
    )
    lines += ["", f"MERGE: {_count(counts['total_mergeable_pairs'], 'pair')}"]
    lines += _limited(
        (
            f"  {short(c['layer_name'])}: {c['neuron_pair'][1]} into {c['neuron_pair'][0]}, correlation "
            f"{c['correlation']:+.4f}; {c['neuron_pair'][0]} explains {c['explained_variance']:.2%} of "
            f"{c['neuron_pair'][1]}{_predicted(c)}"
            for c in recommendations["merge"]
        ),
        limit,
    )
    lines += ["", f"EXPAND: {_count(counts['layers_needing_expansion'], 'layer')}"]
    lines += _limited(
        (
            f"  {short(c['layer_name'])}: {c['current_size']} -> {c['current_size'] + c['suggested_expansion']} "
            f"({c['basis']})"
            for c in recommendations["expand"]
        ),
        limit,
    )
    lines += [""] + [f"Note: {note}." for note in recommendations["metadata"]["notes"]]
    return _text(lines)


def _predicted(entry: Mapping[str, Any]) -> str:
    change, loss = entry.get("predicted_output_change"), entry.get("predicted_loss_change")
    told = "" if change is None else f"; changes what reads it by {change:.2%}"
    return told if loss is None else f"{told}; changes the loss by {loss:+.2g}"


def ranking(
    observation: Observation, findings: Mapping[str, LayerFindings]
) -> list[tuple[int, dict[str, Any]]]:
    """(id, statistics) of all observed neurons, the most often firing first; ties in order of ids."""
    rows = [
        (neuron, neuron_statistics(found, slot, observation.samples))
        for found in findings.values()
        for slot, neuron in enumerate(found.layer.ids)
        if found.observed[slot]
    ]
    return sorted(rows, key=lambda row: (-row[1]["firing_frequency"], row[0]))


def _ranking(title: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[str]:
    lines = [
        title,
        f"{'Rank':<5} {'Neuron ID':<10} {'Layer':<15} {'Local Idx':<10} {'Frequency':<12} {'Mean Act':<10}",
        "-" * 75,
    ]
    for rank, (neuron, s) in enumerate(rows, 1):
        lines.append(
            f"{rank:<5} {neuron:<10} {_cut(s['layer_name'] or '(model)', 15):<15} {s['local_index']:<10} "
            f"{s['firing_frequency']:<12.3f} {s['mean']:<10.4f}"
        )
    return [*lines, ""]


def _layer_table(findings: Mapping[str, LayerFindings], threshold: float) -> list[str]:
    lines = [
        "LAYER-WISE NEURON ANALYSIS",
        "-" * 50,
        f"{'Layer':<20} {'Total':<8} {'Dead':<8} {'Dead %':<8} {'Redundant':<12} {'Red %':<8}",
        "-" * 70,
    ]
    totals = [0, 0, 0]
    for found in findings.values():
        n, dead = len(found.layer.ids), int(found.dead.sum())
        known = found.layer.covariance is not None
        twins = len({s for i, j, _ in found.pairs(threshold) for s in (i, j)}) if known else 0
        totals = [a + b for a, b in zip(totals, (n, dead, twins), strict=True)]
        lines.append(_layer_row(found.layer.label, n, dead, twins if known else None))
    known = any(f.layer.covariance is not None for f in findings.values())
    lines += ["-" * 70, _layer_row("TOTAL", totals[0], totals[1], totals[2] if known else None)]
    if not known:
        lines.append("(redundancy: not observed; start_tracking(enable_correlation_analysis=True))")
    return [*lines, ""]


def _layer_row(label: str, total: int, dead: int, redundant: int | None) -> str:
    shown = ("n/a", "n/a") if redundant is None else (str(redundant), _share(redundant, total))
    return f"{_cut(label, 20):<20} {total:<8} {dead:<8} {_share(dead, total):<8} {shown[0]:<12} {shown[1]:<8}"


def _pair_rows(label: str, pairs: Sequence[tuple[int, int, float]]) -> list[str]:
    lines = []
    strongest = (
        sorted(pairs, key=lambda p: -abs(p[2]))[:MAX_PAIRS] if len(pairs) > MAX_PAIRS else pairs
    )
    for row, (i, j, r) in enumerate(strongest):
        first = (_cut(label, 15), str(len(pairs))) if row == 0 else ("", "")
        lines.append(f"{first[0]:<15} {first[1]:<8} {f'({i}, {j})':<30} {r:<12.4f}")
    if len(pairs) > len(strongest):
        lines.append(f"{'':<24} ... and {len(pairs) - len(strongest)} weaker pairs")
    return lines


def _redundancy_detail(label: str, s: Mapping[str, Any]) -> list[str]:
    return [
        f"{short(label)}:",
        f"  Total neurons: {s['total_neurons']}",
        f"  Redundant pairs: {s['redundant_pairs']}",
        f"  Redundancy rate: {s['redundancy_rate']:.1%}",
        f"  Correlation range: {s['min_correlation']:.3f} - {s['max_correlation']:.3f}",
        f"  Average correlation: {s['avg_correlation']:.3f}",
    ]


def _sources(observation: Observation) -> list[str]:
    lines = [
        f"Total samples processed: {observation.samples}",
        f"Activation threshold: {observation.threshold:g}",
        f"Mode: {observation.mode}",
    ]
    if observation.other_samples:
        lines.append(f"({observation.other_samples} samples of the other mode are kept apart)")
    return lines


def _detail(title: str, word: str, findings: Mapping[str, LayerFindings], pick: Any) -> list[str]:
    lines = []
    for found in findings.values():
        slots = pick(found).nonzero().flatten().tolist()
        if slots:
            lines += [
                f"{short(found.layer.label)}: {_count(len(slots), f'{word} neuron')}",
                f"  Local indices: {_list(slots)}",
            ]
    return ["", title, "-" * 40, *lines] if lines else []


def _unobserved(findings: Mapping[str, LayerFindings]) -> list[str]:
    lines = [
        f"  {short(f.layer.label)} ({f.layer.kind}): {f.layer.problem or 'no finite value'}"
        for f in findings.values()
        if not f.observed.any()
    ]
    lines = ["", "NOT OBSERVED:", "-" * 40, *lines] if lines else []
    if why := next((f.layer.fallback for f in findings.values() if f.layer.fallback), ""):
        lines += ["", f"Layers are observed at their own outputs, not where they are read: {why}"]
    return lines


def _totals(observation: Observation, findings: Mapping[str, LayerFindings]) -> str:
    seen = sum(int(f.observed.sum()) for f in findings.values())
    total = sum(len(f.layer.ids) for f in findings.values())
    return f"{seen} of {total} neurons observed, {observation.samples} samples, mode: {observation.mode}"


def _limited(rows: Iterable[str], limit: int) -> list[str]:
    rows = list(rows)
    more = [f"  ... and {len(rows) - limit} more"] if len(rows) > limit else []
    return rows[:limit] + more


def _list(slots: list[int], limit: int = 60) -> str:
    if len(slots) <= limit:
        return str(slots)
    return f"{str(slots[:limit])[:-1]}, ... {len(slots) - limit} more]"


def _num(value: float, digits: int = 6) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(part: int, whole: int) -> str:
    return f"{_share(part, whole)}%"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0.0"


def _cut(name: str, width: int) -> str:
    """Long module paths keep their end: that is what tells them apart."""
    name = in_line(name)
    return name if len(name) <= width else "..." + name[3 - width :]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _text(lines: Iterable[str]) -> str:
    return plain("\n".join(line.rstrip() for line in lines))

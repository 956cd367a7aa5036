"""Reports say what the statistics say, and their columns add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tracker import NeuronEngine


@pytest.fixture
def engine() -> NeuronEngine:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 70), nn.ReLU(), nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    with torch.no_grad():
        model[0].weight[5:9], model[0].bias[5:9] = 0, 0
        model[2].weight[1], model[2].bias[1] = model[2].weight[0], model[2].bias[0]
        model[2].weight[7], model[2].bias[7] = 0, 0
    engine = NeuronEngine()
    engine.track_model(model, "reports")
    engine.start_tracking(enable_correlation_analysis=True)
    for _ in range(4):
        model(torch.randn(100, 10))
    engine.stop_tracking()
    engine.model = model
    return engine


def rows(text: str, title: str) -> list[list[str]]:
    """The table under a header line that begins with `title`, up to its end."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(title, line))
    table = []
    for line in lines[start + 2 :]:
        if not line:
            break
        if not line.startswith("-"):
            table.append(line.split())
    return table


def printed(capsys: pytest.CaptureFixture[str], call: object) -> str:
    call()
    return capsys.readouterr().out


def test_only_print_and_the_two_reports_print(
    engine: NeuronEngine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = engine.model
    engine.track_model(model)
    engine.register_activation_hooks(model)
    engine.start_tracking(enable_correlation_analysis=True)
    model(torch.randn(50, 10))
    engine.stop_tracking()
    engine.get_summary(), engine.get_dataset_statistics(), engine.get_layer_summary()
    engine.get_dead_neurons(), engine.find_redundant_neurons(), engine.get_redundancy_summary()
    engine.log_epoch_statistics(0, 1, 1)
    engine.generate_optimization_recommendations()
    engine.save_report_to_file(tmp_path / "r.txt")
    engine.save_training_history(tmp_path / "h.json")
    engine.save_optimization_recommendations(tmp_path / "o.json")
    assert capsys.readouterr() == ("", "")


def test_the_dataset_report_adds_up(
    engine: NeuronEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, engine.print_dataset_summary)
    assert "Total samples processed: 400" in text
    assert "Activation threshold: 0.01" in text
    *layers, total = rows(text, "Layer +Total")
    assert [row[0] for row in layers] == ["0", "2", "4"]
    for column in (1, 2):
        assert sum(int(row[column]) for row in layers) == int(total[column])
    for row in (*layers, total):
        assert float(row[3].rstrip("%")) == pytest.approx(100 * int(row[2]) / int(row[1]), abs=0.05)
    assert total[1:3] == ["93", "5"]
    assert "0: 4 dead neurons\n  Local indices: [5, 6, 7, 8]" in text
    assert "2: 1 dead neuron\n  Local indices: [7]" in text


def test_the_correlation_report_adds_up(
    engine: NeuronEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, lambda: engine.print_correlation_analysis(0.95))
    found = engine.find_redundant_neurons(0.95)
    total = sum(map(len, found.values()))
    assert f"Total redundant pairs: {total}" in text
    assert len(re.findall(r"\(\d+, \d+\)", text)) == total
    assert "(0, 1)" in text
    assert f"Redundancy rate: {len(found['2']) / 190:.1%}" in text


def test_a_long_list_of_pairs_is_cut_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1, 30))  # one input: all pairs are redundant
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking(enable_correlation_analysis=True)
    model(torch.randn(100, 1))
    text = printed(capsys, engine.print_correlation_analysis)
    assert "Total redundant pairs: 435" in text
    assert "... and 415 weaker pairs" in text
    assert "Redundancy rate: 100.0%" in text


def test_the_activity_report(engine: NeuronEngine, capsys: pytest.CaptureFixture[str]) -> None:
    text = engine.generate_neuron_report(show_heatmap=False)
    assert capsys.readouterr().out.strip() == text.strip()
    most, least = rows(text, "Rank +Neuron ID"), rows(text[text.index("LEAST ACTIVE") :], "Rank")
    assert len(most) == len(least) == 10
    stats = engine.get_dataset_statistics()
    ranked = sorted(stats, key=lambda n: (-stats[n]["firing_frequency"], n))
    assert [int(row[1]) for row in most] == ranked[:10]
    assert {int(row[1]) for row in least[:5]} == {5, 6, 7, 8, 77}
    *layers, total = rows(text, r"Layer +Total +Dead +Dead % +Redundant")
    for column in (1, 2, 4):
        assert sum(int(row[column]) for row in layers) == int(total[column])


def test_the_activation_summary(engine: NeuronEngine, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, lambda: engine.print_activation_summary(limit=None))
    lines = rows(text, "Neuron ID")
    assert [int(row[0]) for row in lines if len(row) == 7 and row[0].isdigit()] == list(range(93))
    assert lines[0][6] == "4"
    short = printed(capsys, engine.print_activation_summary)
    assert "... and 60 more" in short
    assert "93 of 93 neurons observed, 400 samples" in short


def test_the_report_file(engine: NeuronEngine, tmp_path: Path) -> None:
    path = engine.save_report_to_file(tmp_path / "reports" / "all.txt")
    text = path.read_text()
    for title in (
        "COMPREHENSIVE NEURON ACTIVITY REPORT",
        "DATASET-LEVEL NEURON ANALYSIS REPORT",
        "NEURON CORRELATION ANALYSIS REPORT",
        "OPTIMIZATION RECOMMENDATIONS",
        "Activity heatmap: all_heatmap.png",
    ):
        assert text.count(title) == 1
    assert (tmp_path / "reports" / "all_heatmap.png").read_bytes().startswith(b"\x89PNG")
    engine.save_report_to_file(tmp_path / "plain.txt", include_heatmap=False)
    assert not (tmp_path / "plain_heatmap.png").exists()


def test_pictures_at_ten_and_at_five_thousand_neurons(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5000), nn.ReLU(), nn.Linear(5000, 10))
    engine = NeuronEngine()
    engine.track_model(model, "wide <&> $x_1$")
    for epoch in range(2):
        engine.start_tracking(enable_correlation_analysis=epoch == 1)
        model(torch.randn(64, 6))
        engine.log_epoch_statistics(epoch, 1.0, 0.5)
    for figure, name in (
        (engine.plot_activity_heatmap(tmp_path / "heat.png"), "heat"),
        (engine.plot_correlation_matrix("0", tmp_path / "wide.png"), "wide"),
        (engine.plot_correlation_matrix("2", tmp_path / "narrow.png"), "narrow"),
        (engine.plot_evolution(tmp_path / "evolution.png"), "evolution"),
    ):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert max(figure.get_size_inches()) < 20


def test_a_report_of_a_layer_that_was_not_observed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    engine = NeuronEngine()
    engine.track_model(model)
    engine.start_tracking()
    model[0](torch.randn(5, 4))
    text = printed(capsys, engine.print_dataset_summary)
    assert "NOT OBSERVED:" in text
    assert "1 (Linear): never called in this window" in text
    assert "nan" not in text.lower().replace("nan ", "")
    engine.print_activation_summary()
    engine.plot_activity_heatmap()


def test_the_root_module_itself_may_be_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(4, 3)
    engine = NeuronEngine()
    assert engine.track_model(model) == {"": [0, 1, 2]}
    engine.start_tracking()
    model(torch.randn(5, 4))
    assert "(model)" in printed(capsys, engine.print_dataset_summary)
    assert engine.get_neuron_info(2) == ("", 2)

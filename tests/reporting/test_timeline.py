"""The life of a network: drawn from what was decided and done, and one page to mail around."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.surgery.subjects import prepared
from tests.training.subjects import QUICK
from tracker import NeuronEngine, Policy, StatisticsError


def lived(
    engine: NeuronEngine, model: nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor
) -> Iterator[int]:
    """An epoch of 16 steps at a time."""
    target = torch.randn(len(x), model(x).shape[1])
    for epoch in range(1, 5):
        for _ in range(16):
            loss = (model(x) - target).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            engine.step(loss)
        engine.start_tracking()
        model(x)
        engine.log_epoch_statistics(epoch, float(loss.detach()), epoch / 10)
        engine.stop_tracking()
        yield epoch


def test_the_picture_shows_what_was_done(tmp_path: Path) -> None:
    model, opt, engine, x = prepared("mlp")
    with pytest.raises(StatisticsError, match="start_self_modification"):
        engine.plot_life()
    engine.start_self_modification(
        Policy(**QUICK, shrink=False, grow=True, plateau=1.0, ceiling=40)
    )
    with pytest.raises(StatisticsError, match="step"):
        engine.plot_life()
    epochs = list(lived(engine, model, opt, x))
    engine.merge_neurons([(0, 1)])
    figure = engine.plot_life(tmp_path / "life.png")
    assert (tmp_path / "life.png").stat().st_size > 10_000
    widths, sizes, changes, losses = figure.axes[:4]
    first = next(line for line in widths.lines if line.get_label() == "0")
    seen = [d.widths["0"] for d in engine.life]
    assert list(first.get_ydata()) == [*seen, seen[-1]]
    assert max(seen) > 12
    assert max(sizes.lines[0].get_ydata()) == max(d.parameters for d in engine.life)
    heights = sorted(round(bar.get_height()) for bar in changes.patches)
    came = [len(e.added_ids) for e in engine.journal if e.added_ids]
    assert heights == sorted([*came, -1])
    assert {text.get_text() for text in changes.get_legend().get_texts()} == {"expanded", "merged"}
    accuracy = figure.axes[4].lines[0]
    assert list(accuracy.get_ydata()) == [e / 10 for e in epochs]
    assert list(accuracy.get_xdata()) == [16 * e for e in epochs]
    assert losses.lines[0].get_xdata()[-1] == 64


def test_who_is_born_later_has_a_shorter_history() -> None:
    model, opt, engine, x = prepared("mlp")
    engine.start_self_modification(
        Policy(**{**QUICK, "warm_up": 30}, shrink=False, grow=True, plateau=1.0)
    )
    list(lived(engine, model, opt, x))
    born = {i: e.step for e in engine.journal for i in e.added_ids}
    for neuron, step in born.items():
        assert engine.get_neuron_evolution(neuron)["epochs"] == list(range(step // 16 + 1, 5))
    assert set(born.values()) == {42, 54}


class Parsed(HTMLParser):
    """Balanced tags, and all that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], set(), [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    model, opt, engine, x = prepared("mlp")
    engine.start_self_modification(Policy(**QUICK, tolerance=0.05, grow=True, plateau=1.0))
    list(lived(engine, model, opt, x))
    path = engine.save_html_report(tmp_path / "deep" / "page.html")
    page = Parsed(path.read_text(encoding="utf-8"))
    assert len(page.sources) == 3
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "script" not in page.tags
    for entry in engine.journal:
        assert f"{entry.parameters_before:,} → {entry.parameters_after:,}" in page.text
    for decision in engine.life:
        assert decision.why in page.text


def test_names_are_not_taken_for_html(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    model.add_module("<script>alert(1)</script>", nn.Linear(6, 2))
    engine = NeuronEngine()
    engine.track_model(model, '"><img src=x onerror=alert(1)>', example_inputs=torch.randn(3, 4))
    engine.prune_neurons({"0": [1]})
    page = Parsed(engine.save_html_report(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not page.sources  # nothing was observed, nothing lived: tables alone
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text

"""Every example in the manual runs and prints what it says, and every link leads somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import matplotlib
import pytest

from tracker import NeuronEngine
from tracker.reporting import text_reports

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block of Python, and the block of text right behind it, if there is one: what it prints.
EXAMPLE = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text(encoding="utf-8")
    for needs in re.findall(r"<!-- needs: (.*) -->", text):
        for package in needs.split(", "):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASHION_MNIST_OFFLINE", "1")
    matplotlib.use("Agg")
    monkeypatch.setattr(text_reports, "_SECTIONS", {})  # what a page registers stays on it
    examples = list(EXAMPLE.finditer(text))
    assert len(examples) == text.count("```python")
    namespace: dict[str, object] = {"__name__": page.stem}
    for example in examples:
        # With its real line number, an error names the line of the page.
        blank = "\n" * text.count("\n", 0, example.start(1))
        exec(compile(blank + example[1], str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if example[2] is not None:
            assert printed == example[2]


def test_links_lead_somewhere() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 10
    assert [link for page, link in links if not (page.parent / link).exists()] == []


def test_usage_names_every_call() -> None:
    usage = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    calls = [name for name, _ in inspect.getmembers(NeuronEngine) if not name.startswith("_")]
    assert [name for name in calls if not re.search(rf"\b{name}\b", usage)] == []

"""The language model that shrinks while it learns: to its budget, through kills, and out again, on a tiny one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.export.llamas import llama
from tests.export.test_gguf import byte_pairs

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")

DEMOS = Path(__file__).resolve().parent.parent / "demos"
WINDOW = 32


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """It as a module."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(DEMOS)
    for name in ("_common", "_run_export", "_smollm", "specialise_demo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("specialise_demo")


@pytest.fixture
def demo(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, but it starts no process and writes no GGUF: that takes long."""
    speeds = {"prompt": [2.0, 3.0], "generation": [1.0, 1.5], "memory": [100.0]}
    monkeypatch.setattr(script, "in_its_own_process", lambda *paths, times=0: speeds)
    monkeypatch.setattr(script, "apart", lambda call, *args: call(*args))
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    return script


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A model of some thousand parameters, twenty texts, and settings of a short run."""
    llama(vocab_size=112).save_pretrained(tmp_path / "model")
    byte_pairs().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"hello the {i} tell " * 150)
    (tmp_path / "text" / "20.bin").write_bytes(b"\0\1\2")
    settings = {"model": str(tmp_path / "model"), "text": str(tmp_path / "text"), "rate": 3e-3}
    return settings | {"window": WINDOW, "tokens": 24 * WINDOW}


class Letters:
    """A tokenizer: each byte is a token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_few_windows_are_of_many_files_and_none_of_those_for_testing(
    script: Any, tmp_path: Path
) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(chr(ord("a") + i) * 25)
    windows = script.stream(Letters(), 34, 0, folder=tmp_path, length=8)
    found = [bytes(x[0].tolist()).decode() for x in windows]
    assert {len(x) for x in found} == {8}
    whole = "bcdefghijl"  # "a" and "k" are each tenth
    for begin in (0, 10, 20):  # each file once, then each once more; what is left of them is joined
        assert sorted(x[0] for x in found[begin : begin + 10]) == list(whole)
    assert sorted(found[30]) == sorted(set(found[30]))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "one.txt").write_text("for testing")
    with pytest.raises(ValueError, match="no text to train on"):
        script.stream(Letters(), 1, 0, folder=alone)


def run(demo: Any, settings: Any, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return demo.train(settings, folder, save_every=3)


def test_it_meets_its_budget_is_better_than_before_and_loads_elsewhere(
    demo: Any, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    dense, mine = demo.specialise(demo.Settings(**tiny, keep=0.6), folder)
    assert 0.59 * dense["parameters"] < mine["parameters"] <= 0.6 * dense["parameters"]
    assert mine["perplexity"] < dense["perplexity"] / 2
    assert json.loads((folder / "result.json").read_text()) == mine
    assert (folder / "life.png").stat().st_size > 1000
    written = load_file(folder / "specialised" / "model.safetensors")
    assert sum(t.numel() for t in written.values()) == mine["parameters"]
    told = capsys.readouterr().out
    assert f"| specialised | {mine['parameters']:,} (60%) | {mine['perplexity']:.3f} |" in told
    assert "| 100 | 3.0 | 1.5 |" in told
    # What is done is not done again, and other settings do not overwrite it.
    assert demo.specialise(demo.Settings(**tiny, keep=0.6), folder) == [dense, mine]
    with pytest.raises(SystemExit, match="other settings"):
        demo.specialise(demo.Settings(**tiny, keep=0.5), folder)


@pytest.mark.parametrize(("turns", "done"), [(1, ["compressed"]), (3, ["pruned", "pruned"])])
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(
    turns: int,
    done: list[str],
    demo: Any,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before its first save, within a look, and while a change awaits its verdict."""
    settings = demo.Settings(**tiny, turns=turns)
    model, _, engine = run(demo, settings, tmp_path / "whole")
    losses = demo.losses
    for steps_until in (2, 4, 5):
        left = iter(range(steps_until))

        def killed(*args: Any, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return losses(*args)

        monkeypatch.setattr(demo, "losses", killed)
        with pytest.raises(KeyboardInterrupt):
            run(demo, settings, tmp_path / "killed")
    monkeypatch.setattr(demo, "losses", losses)
    again, _, other = run(demo, settings, tmp_path / "killed")
    assert [d.what for d in other.life if d.what != "kept"] == done
    assert str(other.life) == str(engine.life)
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize(
    "options",
    [{"train": "blocks", "distil": True, "of": "flops"}, {"of": "latency", "keep": 0.3}],
    ids=str,
)
def test_other_ways_to_train_and_to_count(
    options: dict[str, Any], demo: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = demo.Settings(**tiny | {"tokens": 12 * WINDOW} | options)
    dense = settings.load()[0]
    model, _, engine = run(demo, settings, tmp_path / "out")
    learnt = not torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert learnt is (settings.train == "all")
    assert engine.count_parameters() < sum(p.numel() for p in dense.parameters())


def test_adapters_learn_on_what_stays_and_merge(
    demo: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    settings = demo.Settings(**tiny, train="lora")
    model, tokenizer, _ = run(demo, settings, tmp_path / "out")
    ids = settings.held_out(tokenizer)[0][:, :32]
    with torch.no_grad():
        wrapped = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, wrapped, atol=1e-5)
    widths = {b.mlp.gate_proj.out_features for b in merged.model.layers}
    assert max(widths) < 48


@pytest.mark.slow
def test_what_it_ships_runs_in_processes_of_their_own(
    script: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer, _ = run(script, script.Settings(**tiny), tmp_path / "out")
    runs = script.shipped(model, tokenizer, tmp_path / "out", "mine", torch.arange(3, 35)[None])
    assert runs["transformers"]["bytes"] > 0
    rows = [{"runs": runs}, {"runs": runs}]
    speeds = script.in_turns(rows, tmp_path / "out")
    assert set(speeds) == {by for by, run in runs.items() if "memory" in run} > set()
    assert all(min(one["prompt"]) > 0 for one in speeds.values())

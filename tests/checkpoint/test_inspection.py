"""python -m tracker: show, diff, validate; and the schemas say what jsonschema takes them to say."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.checkpoint.runs import ROOT, begun
from tests.checkpoint.test_hostile_files import HOSTILE, edit, put
from tests.surgery.subjects import train
from tracker.__main__ import main
from tracker.utils.json_schema import FOLDER, load_schema, problems

KEYWORDS = {
    "$ref", "type", "oneOf", "const", "enum", "minimum", "maximum", "minItems", "maxItems", "uniqueItems", "pattern",
    "properties", "required", "propertyNames", "additionalProperties", "prefixItems", "items",
    "$schema", "$id", "title", "description", "$defs",
}  # fmt: skip
KINDS = {
    "journal.json": "journal.schema.json",
    "history.json": "training_history.json",
    "recommendations.json": "optimization_recommendations.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    model, opt, engine, x = begun("mlp")
    engine.prune_neurons({"0": [0, 3]})
    engine.insert_layer("0")
    engine.save_checkpoint(path / "old")
    train(model, opt, x)
    engine.expand_layer("2", 2)
    engine.save_checkpoint(path / "run")
    engine.save_training_history(path / "history.json")
    engine.save_optimization_recommendations(path / "recommendations.json")
    (path / "journal.json").write_text(json.dumps(engine.journal.to_dict()))
    return path


def test_show_tells_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for name in ("run", *KINDS):
        assert main(["show", str(folder / name)]) == 0
        said[name] = capsys.readouterr().out
    assert "Checkpoint of 'mlp'" in said["run"]
    assert "optimizer: Adam, learning rate 0.001" in said["run"]
    assert "0: 10" in said["run"]
    for name in ("run", "journal.json"):
        assert "Journal of 3 changes" in said[name]
        assert "insert_layer" in said[name]
        assert "0 followed by a new layer" in said[name]
    for name in ("run", "history.json"):
        assert "over 3 epochs" in said[name]
    assert "prune: " in said["recommendations.json"]


def test_diff_tells_what_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", *KINDS):
        assert main(["diff", str(folder / name), str(folder / name)]) == 0
        assert capsys.readouterr().out == "No difference.\n"
    assert main(["diff", str(folder / "old"), str(folder / "run")]) == 1
    said = capsys.readouterr().out
    assert "the first 2 changes are the same" in said
    assert "only in the second: 3. expand_layer" in said
    assert "model: 2.weight (9, 10) torch.float32 -> (11, 10) torch.float32" in said
    assert "model: 0.weight differs by up to" in said
    assert main(["diff", str(folder / "old"), str(folder / "journal.json")]) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_validate_finds_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    paths = [str(folder / name) for name in ("run", "old", *KINDS)]
    assert main(["validate", *paths]) == 0
    for name in (
        "half of model.safetensors",
        "a bit of engine.json",
        "an unknown operation",
        "a pipe for a manifest",
    ):
        bad = tmp_path / name
        shutil.copytree(folder / "run", bad)
        HOSTILE[name](bad)
        assert main(["validate", *paths, str(bad)]) == 1
    for name in KINDS:
        data = json.loads((folder / name).read_text())
        data["more"] = 1
        (tmp_path / name).write_text(json.dumps(data))
        assert main(["validate", str(tmp_path / name)]) == 1
    for text in ("", "[1]", "{}", "nan", "\x00", "[" * 10**5):
        (tmp_path / "text").write_text(text)
        assert main(["validate", str(tmp_path / "text")]) == 1
    assert main(["validate", str(tmp_path / "nothing")]) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_told_and_no_more(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "run"
    shutil.copytree(folder / "run", bad)
    HOSTILE[name](bad)
    for command in (
        ["validate", str(bad)],
        ["show", str(bad)],
        ["diff", str(bad), str(folder / "run")],
    ):
        assert main(command) in (0, 1)
    said = capsys.readouterr()
    assert said.out or said.err


def test_names_do_not_steer_the_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    edit("engine.json", lambda d: put(d, "name", value="\x1b[2J"))(tmp_path / "run")
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_it_runs_as_a_module(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tracker", "validate", str(folder / "run")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "whole" in done.stdout


def test_only_known_keywords_are_used() -> None:
    def walk(part: Any) -> None:
        if isinstance(part, dict):
            assert set(part) <= KEYWORDS
            for key, value in part.items():
                for inner in value.values() if key in ("properties", "$defs") else [value]:
                    walk(inner)
        elif isinstance(part, list):
            for value in part:
                walk(value) if isinstance(value, dict) else None

    for path in FOLDER.glob("*.json"):
        walk(load_schema(path.name))


@pytest.mark.parametrize("name", KINDS)
def test_our_reading_of_a_schema_is_that_of_jsonschema(name: str, folder: Path) -> None:
    data, schema = json.loads((folder / name).read_text()), load_schema(KINDS[name])
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(problems(data, schema))
    draw, verdicts = random.Random(0), set[bool]()
    for _ in range(300):
        changed = copy.deepcopy(data)
        _spoil(changed, draw)
        assert (not list(problems(changed, schema))) == validator.is_valid(changed)
        verdicts.add(validator.is_valid(changed))
    assert False in verdicts


def _spoil(data: Any, draw: random.Random) -> None:
    """Change one place, at a random depth."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = data[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            data = inner
            continue
        kind = draw.randrange(4)
        if kind == 0 and isinstance(data, dict):
            data[f"{key}x"] = data.pop(key)
        elif kind == 1 and isinstance(data, list):
            data.append(copy.deepcopy(inner))
        else:
            data[key] = draw.choice([None, -1, 0, 1.5, 2.0, True, "x", [], {}, [1, 2], "masked"])
        return

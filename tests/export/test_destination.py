"""Exports replace exports, and nothing else; what cannot be written leaves what was there."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.test_files import full_disk, listing, read_only
from tracker import TrackerError
from tracker.errors import ExportError
from tracker.export.destination import MARK, whole_or_nothing


def put(path: Path, kind: str, text: str = "new", size: int = 0) -> None:
    with whole_or_nothing(path, kind) as made:
        files = [made]
        if kind == "directory":
            (made / "inner").mkdir(parents=True)
            files = [made / "config.json", made / "inner" / "model.safetensors"]
        for file in files:
            file.write_bytes(text.encode() + b"." * size)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_export_replaces_an_export(kind: str, tmp_path: Path) -> None:
    goal = tmp_path / "deep" / "out"
    put(goal, kind, "old")
    put(goal, kind, "new")
    texts = {
        data for name, data in listing(goal.parent).items() if data is not None and MARK not in name
    }
    assert texts == {b"new"}
    assert [p.name for p in goal.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "forge",
    [
        lambda p: shutil.rmtree(p / "inner"),
        lambda p: (p / "thesis.tex").write_text("mine"),
        lambda p: (p / "inner" / "thesis.tex").write_text("mine"),
        lambda p: (p / "empty").mkdir(),
        lambda p: (p / MARK).unlink(),
        lambda p: (p / MARK).write_text("[" * 10**5),
        lambda p: (p / MARK).write_text(json.dumps({"files": ["config.json"]})),
        lambda p: (p / MARK).write_text(json.dumps({"format": "tracker export", "version": 1})),
        lambda p: ((p / MARK).unlink(), (p / MARK).symlink_to("/dev/zero")),
    ],
)
def test_a_directory_is_ours_by_its_list_alone(forge, tmp_path: Path) -> None:
    """A model's own folder has a config.json and weights as well."""
    goal = tmp_path / "out"
    put(goal, "directory", "the weights before")
    forge(goal)
    before = listing(goal) if not (goal / MARK).is_symlink() else None
    with pytest.raises(ExportError, match="no earlier export"):
        put(goal, "directory")
    assert (goal / "config.json").read_bytes() == b"the weights before"
    assert before is None or listing(goal) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="limits of this kind are of POSIX")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_cannot_be_written_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    put(folder / "out", kind, "old")
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    before = listing(folder)
    with full_disk(), pytest.raises(TrackerError, match="written"):
        put(folder / "out", kind, size=1000)
    with read_only(folder), pytest.raises(TrackerError, match="written"):
        put(folder / "out", kind)
    others = [folder / "file" / "out", folder / "pipe", folder / "x\0y", Path("/dev/null"), folder]
    for path in others if kind == "file" else [*others, folder / "file"]:
        with pytest.raises(ExportError):
            put(path, kind)
    assert listing(folder) == before
    assert Path("/dev/null").is_char_device()
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(folder / "out", kind):
        raise KeyboardInterrupt
    assert listing(folder) == before


def test_a_link_stays_and_a_private_file_stays_private(tmp_path: Path) -> None:
    target, link = tmp_path / "model.onnx", tmp_path / "link"
    target.write_text("of yesterday")
    target.chmod(0o600)
    link.symlink_to(target)
    put(link, "file")
    assert link.is_symlink()
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", 0o600)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_two_writers_at_once_do_not_mix(kind: str, tmp_path: Path) -> None:
    goal, failed = tmp_path / "out", list[BaseException]()
    put(goal, kind, "a" * 999)

    def repeat(letter: str) -> None:
        try:
            for _ in range(20):
                put(goal, kind, letter * 999)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=repeat, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    texts = {data for name, data in listing(tmp_path).items() if data and MARK not in name}
    assert texts in ({b"a" * 999}, {b"b" * 999})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

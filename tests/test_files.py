"""Every call that writes or reads a file: whole or not at all, errors of ours, and names that are only names."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tracker import NeuronEngine, Policy, TrackerError, apply_journal
from tracker.__main__ import main
from tracker.statistics.native import build, loading

LAYER = "<script>alert(1)</script>\x1b[2J\0$\\bad$\u202e\n0: 9 dead"
MODEL = "../../etc/passwd\0\x1b]0;x\x07<script>alert(2)</script>$\\frac"
FileCall = Callable[[NeuronEngine, Path], Any]
WRITERS: dict[str, FileCall] = {
    "history.json": lambda e, p: e.save_training_history(p),
    "advice.json": lambda e, p: e.save_optimization_recommendations(p, pruning_threshold=0.4),
    "report.txt": lambda e, p: e.save_report_to_file(p),
    "page.html": lambda e, p: e.save_html_report(p),
    "activity.png": lambda e, p: e.plot_activity_heatmap(p),
    "shown.png": lambda e, p: e.generate_neuron_report(show_heatmap=False, save_heatmap=p),
    "correlation.svg": lambda e, p: e.plot_correlation_matrix(next(iter(e.get_layer_summary())), p),
    "evolution.pdf": lambda e, p: e.plot_evolution(p),
    "life.png": lambda e, p: e.plot_life(p),
    "structure.png": lambda e, p: e.structure.plot(p),
    "checkpoint": lambda e, p: e.save_checkpoint(p),
}
READERS: dict[str, FileCall] = {
    "history.json": lambda e, p: e.load_training_history(p),
    "advice.json": lambda e, p: e.apply_recommendations(p),
    "checkpoint": lambda e, p: NeuronEngine.load_checkpoint(p, e.tracker.current.model()),
    "checkpoint/": lambda e, p: apply_journal(e.tracker.current.model(), p),
    "journal.json": lambda e, p: said(main(["show", str(p)])),
}


def said(status: int) -> None:
    if status:
        raise TrackerError("as the command says")


def began(layer: str = LAYER, model: str = MODEL, value: float = 1.0) -> NeuronEngine:
    """An engine that has something to write at every door."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, part in {layer: nn.Linear(4, 8), "act": nn.ReLU(), "out": nn.Linear(8, 3)}.items():
        net.add_module(name, part)
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
        net[0].weight[2], net[0].bias[2] = 0, -1
    x = torch.randn(32, 4)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    engine = NeuronEngine()
    engine.track_model(net, model, example_inputs=x)
    engine.attach_optimizer(optimizer)
    engine.start_tracking(enable_correlation_analysis=True)
    engine.start_self_modification(
        Policy(warm_up=0, every=6, look=2, settle=1, floor=2, tolerance=0.5)
    )
    for step in range(7):
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.step(loss.detach())
        engine.log_epoch_statistics(step, value, 0.5)
    assert len(engine.journal)
    engine.start_tracking(enable_correlation_analysis=True)
    net(x)
    engine.kept = net  # the engine itself holds it weakly
    return engine


@pytest.fixture(scope="module")
def engine() -> NeuronEngine:
    return began()


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parts of a picture lie, and its many points, take longest, and are nothing that is asked here."""
    import matplotlib
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "set_layout_engine", lambda self, *args, **kwargs: None)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 20)


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".txt", ".html"):
            yield path.name, path.read_text(encoding="utf-8")


def is_plain(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_names_are_nothing_but_names(
    engine: NeuronEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "it"
    for name, write in WRITERS.items():
        write(engine, folder / name)
    names = {p.name for p in folder.iterdir()}
    assert names == {*WRITERS, "report_heatmap.png"}
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    for name, text in texts(folder):
        assert is_plain(text), name
        assert not any(line.startswith("0: 9 dead") for line in text.splitlines()), name
        if name.endswith(".html"):
            assert "<script" not in text
            assert "&lt;script&gt;alert(1)" in text
        if name == "history.json":
            layers = {n["layer_name"] for n in json.loads(text)["neuron_histories"].values()}
            assert layers == {LAYER, "out"}
    engine.print_activation_summary()
    engine.print_dataset_summary()
    engine.print_correlation_analysis()
    engine.print_optimization_recommendations()
    engine.generate_neuron_report(show_heatmap=False)
    engine.generate_pruning_recommendations()
    print(engine.journal, engine.structure, engine.expand_layer(LAYER, 1), engine.undo())
    for path in ("checkpoint", "history.json", "advice.json"):
        assert main(["show", str(folder / path)]) == 0
        assert main(["validate", str(folder / path), str(folder / (path + "\x1b[2J"))]) == 1
    assert main(["diff", str(folder / "checkpoint"), str(folder / "checkpoint")]) == 0
    told = capsys.readouterr()
    assert is_plain(told.out + told.err)
    assert "0: 9 dead" not in (line[:9] for line in told.out.splitlines())
    again = began()
    resumed = NeuronEngine.load_checkpoint(folder / "checkpoint", built())
    assert LAYER in resumed.get_layer_summary()
    again.load_training_history(folder / "history.json")
    assert again.apply_recommendations(folder / "advice.json").removed_ids


def built() -> nn.Module:
    net = nn.Sequential()
    for name, part in {LAYER: nn.Linear(4, 8), "act": nn.ReLU(), "out": nn.Linear(8, 3)}.items():
        net.add_module(name, part)
    return net


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may be longer than some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write into the directory, nor this process if it belongs to root."""
    root = os.geteuid() == 0
    before = [
        (p, p.stat().st_mode) for p in (folder, *folder.parents) if p.stat().st_uid == os.geteuid()
    ]
    for path, mode in before[:4] if root else ():  # others may look
        os.chmod(path, mode | 0o555)
    os.chmod(folder, 0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in before:
            os.chmod(path, mode)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


QUICK = ("history.json", "advice.json", "structure.png", "checkpoint")
DOORS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WRITERS]


@pytest.mark.skipif(os.name == "nt", reason="limits of this kind are of POSIX")
@pytest.mark.parametrize("name", DOORS)
def test_what_cannot_be_written_leaves_what_was_there(
    name: str, engine: NeuronEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, folder = WRITERS[name], tmp_path / "there"
    write(engine, folder / name)
    before = listing(folder)
    with full_disk(), pytest.raises(TrackerError, match="written"):
        write(engine, folder / name)
    assert listing(folder) == before
    with read_only(folder), pytest.raises(TrackerError, match="written"):
        write(engine, folder / name)
    assert listing(folder) == before
    write(engine, folder / name)  # and then it can be written again
    (folder / "file").write_text("mine")
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "mine").write_text("mine")
    os.mkfifo(folder / "pipe.png")
    before = listing(folder)
    elsewhere = [
        folder / "file" / name,
        folder / "folder.png",
        folder / "pipe.png",
        folder / ("x\0" + name),
    ]
    devices = [Path("/dev/full"), Path("/dev/null")] if name != "life.png" else []
    for path in [
        *elsewhere,
        *(d for d in devices if "." not in name or name.endswith((".json", ".txt", ".html"))),
    ]:
        start, facts = time.perf_counter(), path.stat() if path in devices else None
        with pytest.raises(TrackerError):
            write(engine, path)
        assert time.perf_counter() - start < 20  # nobody reads from the pipe
        assert facts is None or path.stat().st_ino == facts.st_ino
    assert listing(folder) == before


@pytest.mark.parametrize("name", ["history.json", "structure.png"])
def test_a_link_stays_and_a_private_file_stays_private(
    name: str, engine: NeuronEngine, tmp_path: Path
) -> None:
    target, link = tmp_path / "runs" / name, tmp_path / name
    target.parent.mkdir()
    target.write_text("of yesterday")
    target.chmod(0o600)
    link.symlink_to(target)
    WRITERS[name](engine, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_size > 20


def test_pictures_have_endings_that_matplotlib_knows(engine: NeuronEngine, tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="png"):
        engine.plot_evolution(tmp_path / "picture.docx")
    assert not list(tmp_path.iterdir())
    engine.plot_evolution(tmp_path / "picture")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


ENDS = {
    ".json": b"}\n", ".txt": b"heatmap.png\n", ".html": b"</html>\n", ".png": b"IEND\xaeB`\x82",
    ".svg": b"</svg>\n", ".pdf": b"%%EOF\n",
}  # fmt: skip


@pytest.mark.parametrize("name", DOORS)
def test_two_writers_at_once_do_not_mix(name: str, tmp_path: Path) -> None:
    engines = [began("short", "one", 1.0), began("much longer", "another" * 9, 123.456)]
    write, path = WRITERS[name], tmp_path / name
    write(engines[0], path)
    failed: list[BaseException] = []

    def repeat(engine: NeuronEngine) -> None:
        try:
            for _ in range(3):
                write(engine, path)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=repeat, args=(e,)) for e in engines]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if name != "checkpoint":
            data = path.read_bytes()
            assert data.endswith(ENDS[path.suffix])
            if path.suffix == ".json":
                json.loads(data)
        time.sleep(0.01)
    for writer in writers:
        writer.join()
    assert not failed
    if name == "checkpoint":
        assert main(["validate", str(path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} <= {name, "report_heatmap.png"}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "nothing there": lambda p: None,
    "a pipe": pipe,
    "a device without end": endless,
    "a terabyte of nothing": huge,
    "an empty file": lambda p: p.write_bytes(b"") and None,
    "bytes": lambda p: p.write_bytes(bytes(range(256)) * 9) and None,
    "deep without end": lambda p: p.write_text("[" * 10**6) and None,
    "a long number": lambda p: p.write_text("9" * 10**5) and None,
    "null": lambda p: p.write_text("null") and None,
    "a folder": lambda p: p.mkdir(),
}


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices are of POSIX")
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_changes_nothing(
    name: str, kind: str, engine: NeuronEngine, tmp_path: Path
) -> None:
    path = tmp_path / name.rstrip("/")
    UNREADABLE[kind](path)
    model = engine.tracker.current.model()
    before = [t.clone() for t in model.state_dict().values()], engine.history.to_dict()
    start = time.perf_counter()
    for asked in (path, Path(str(path) + "\0")):
        with pytest.raises(TrackerError):
            READERS[name](engine, asked)
    assert time.perf_counter() - start < 2
    assert all(map(torch.equal, model.state_dict().values(), before[0]))
    assert engine.history.to_dict() == before[1]


@pytest.mark.skipif(not build.compilers(), reason="there is no compiler here")
def test_a_full_disk_leaves_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compilers", lambda: [[shutil.which("c++") or "g++"]])
    with full_disk():
        assert loading.load() is None
    assert [p for p in tmp_path.rglob("*") if not p.is_dir()] == []

"""Compiled code and torch find the same; and where there is no compiled code, torch answers without a word."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.statistics import oracle
from tracker.statistics import (
    Activity,
    ActivityStream,
    Covariance,
    CovarianceStream,
    Scratch,
    covariance,
    native,
    observe,
    stream,
)
from tracker.statistics.activity import M2, MEAN, OBSERVATIONS
from tracker.statistics.native import build, calls, loading
from tracker.utils.slotmap import SlotMap

STREAMS = oracle.streams()
ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="no compiled code here")
needs_compiler = pytest.mark.skipif(not build.compilers(), reason="no compiler here")
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="scripts and modes of POSIX")


def accumulated(
    batches: list[torch.Tensor], axis: int, monkeypatch: pytest.MonkeyPatch, by_torch: bool = False
) -> Activity:
    """The statistics of one of the two paths."""
    with monkeypatch.context() as patch:
        if by_torch:
            patch.setattr(stream, "kernel", lambda: None)
        layer = ActivityStream(batches[0].shape[axis], 0.01)
        scratch = Scratch()
        for batch in batches:
            layer.add(batch, axis, scratch)
        return layer.value()


def same(actual: Activity, expected: Activity) -> None:
    """What is counted or compared is equal, moments to rounding."""
    exact = [row for row in range(9) if row not in (MEAN, M2)]
    assert torch.equal(actual.table[exact], expected.table[exact])
    a, b = actual.value(), expected.value()
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-6)
    spread = b.variance.sqrt() + 1e-7 * b.mean.abs()
    assert ((a.mean - b.mean).abs() <= 1e-6 * spread)[b.observations > 0].all()


@needs_kernel
@pytest.mark.parametrize("name", STREAMS)
def test_both_paths_agree_on_every_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = STREAMS[name]
    ours = accumulated(batches, -1, monkeypatch)
    same(ours, accumulated(batches, -1, monkeypatch, by_torch=True))


@needs_kernel
@pytest.mark.parametrize("name", [n for n in STREAMS if n not in ("float64", "tiny", "huge")])
@pytest.mark.parametrize("shape", [(7, 7), (2, 2), (10, 10), (64, 80)], ids=str)
def test_maps_of_every_stream(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values as maps, channels first and channels last: small, uneven and large ones."""
    values = torch.cat(STREAMS[name]).flatten()
    size = 5 * shape[0] * shape[1]
    maps = values[: values.numel() // size * size].view(-1, 5, *shape)
    if not len(maps):
        maps = values.repeat(1 + size // values.numel())[:size].view(-1, 5, *shape)
    for batches in ([maps], list(maps.split(3)), [maps.to(memory_format=torch.channels_last)]):
        ours = accumulated(batches, 1, monkeypatch)
        expected = oracle.activity(maps, 1)
        np.testing.assert_allclose(ours.value().variance, expected["variance"], rtol=1e-6)
        for exact in ("observations", "minimum", "maximum", "nonfinite"):
            np.testing.assert_array_equal(getattr(ours.value(), exact), expected[exact])
        for share in ("firing_frequency", "zero_fraction"):
            np.testing.assert_allclose(getattr(ours.value(), share), expected[share], rtol=1e-12)


def awkward() -> dict[str, tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(300, 70, generator=g).relu()
    maps = torch.randn(6, 12, 9, 5, generator=g)
    nan, inf = x.clone(), x.clone()
    nan[299, 69], inf[0, 3], inf[5, 3] = torch.nan, torch.inf, -torch.inf
    broken_map = maps.clone()
    broken_map[5, 11, 8, 4] = torch.nan
    with torch.inference_mode():
        inside = torch.randn(40, 33)
    return {
        "NaN": (nan, 1),
        "infinity": (inf, 1),
        "NaN in half precision": (nan.half(), 1),
        "infinity in bfloat16": (inf.bfloat16(), 1),
        "infinity in half precision": (inf.half(), 1),
        "NaN in a map": (broken_map, 1),
        "constant": (torch.full((500, 40), 0.1), 1),
        "constant and large": (torch.full((77, 3), 1e7), 1),
        "one row": (x[:1], 1),
        "one value": (x[0, :1], 0),
        "one column": (x[:, :1], 1),
        "a slice of rows": (x[::3], 1),
        "a slice of columns": (x[:, 5:23], 1),
        "every other column": (x[:, ::2], 1),
        "transposed": (x.T, 0),
        "neurons first": (x.T.contiguous(), 0),
        "channels last": (maps.to(memory_format=torch.channels_last), 1),
        "a slice of channels": (maps[:, 2:9], 1),
        "tokens": (torch.randn(4, 50, 96, generator=g), -1),
        "reversed": (x.flip(0), 1),
        "negated by a flag": (torch.conj(torch.complex(x, x)).imag, 1),
        "with a gradient": (x.clone().requires_grad_(), 1),
        "a parameter": (torch.nn.Parameter(x), 1),
        "from inference": (inside, 1),
        "half, below normal": ((x * 1e-6).half(), 1),
        "bfloat16": (x.bfloat16(), 1),
        "negative zeros": (-x, 1),
        "at the threshold": (torch.full((90, 5), 0.01) * x[:90, :5].sign().sub(0.5), 1),
        "exactly the threshold": (torch.full((90, 40), -0.01), 1),
        "maps at the threshold": (torch.full((3, 4, 7, 7), 0.01), 1),
        "far from its first row": (torch.cat((x[:1] + 1e6, x - 1e3, x + 1e5)), 1),
        "many short maps": (torch.randn(700, 3, 5, generator=g), 1),
        "one long map": (torch.randn(1, 2, 70_001, generator=g) + 100, 1),
    }


AWKWARD = awkward()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", AWKWARD)
def test_both_paths_agree_on_awkward_tensors(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and after a batch; with torch's threads as well, from the first value on."""
    x, axis = AWKWARD[name]
    before = torch.get_num_threads()
    monkeypatch.setattr(calls, "PARALLEL", 1)
    torch.set_num_threads(threads)
    try:
        for batches in ([x], [torch.randn_like(x.detach()), x]):
            ours = accumulated(batches, axis, monkeypatch)
            same(ours, accumulated(batches, axis, monkeypatch, by_torch=True))
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_large_tensors_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and neurons are shared out: few wide rows, many narrow ones, maps."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for shape in ((300, 3000), (40_000, 20), (30, 4, 64, 64), (9000, 5, 3, 3)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(8)) + 3
            expected, actual = oracle.activity(x, 1), observe(x, 1, 0.01, Scratch()).value()
            np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-6)
            np.testing.assert_array_equal(actual.minimum, expected["minimum"])
            np.testing.assert_allclose(
                actual.firing_frequency, expected["firing_frequency"], rtol=1e-12
            )
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_the_mean_of_a_batch_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What correlation centres on; none where values are not finite."""
    layer, x = ActivityStream(70, 0.01), AWKWARD["a slice of rows"][0]
    layer.add(x + 5, 1, Scratch())
    mean = layer.add(x, 1, Scratch(), mean=True)
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-7, atol=1e-9)
    assert layer.add(AWKWARD["NaN"][0], 1, Scratch(), mean=True) is None


@needs_kernel
def test_what_was_read_does_not_change_any_more() -> None:
    """The table is written in place; what was handed out is a copy, and so is what was handed in."""
    layer = ActivityStream(4, 0.01)
    layer.add(torch.randn(10, 4), 1, Scratch())
    first = layer.value()
    kept = first.table.clone()
    resumed, moved = ActivityStream.resumed(first, 0.01), layer.remap(SlotMap((2, 0, None)))
    for each, width in ((layer, 4), (resumed, 4), (moved, 3)):
        each.add(torch.randn(10, width), 1, Scratch())
    assert torch.equal(first.table, kept)
    assert moved.value().table[OBSERVATIONS].tolist() == [20, 20, 10]


@needs_kernel
def test_windows_that_begin_in_inference_mode_go_on_outside() -> None:
    x = torch.randn(20, 4)
    with torch.inference_mode():
        layer = ActivityStream(4, 0.01)
        layer.add(x[:5], 1, Scratch())
        layer.add(torch.full((2, 4), torch.nan), 1, Scratch())
    layer.add(x[5:], 1, Scratch())
    expected = oracle.activity(x)
    np.testing.assert_allclose(layer.value().value().variance, expected["variance"], rtol=1e-6)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    cache = tmp_path / "cache"
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(cache))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return cache


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one line in the log."""
    (record,) = caplog.records
    assert record.name == "tracker"
    return record.getMessage()


@needs_kernel
@needs_compiler
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_every_vector_width(
    capability: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All widths that this processor has."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = build.capability()
    if capability != here and (here not in order or order.index(capability) > order.index(here)):
        pytest.skip(f"{here} here")
    monkeypatch.setattr(build, "capability", lambda: capability)
    monkeypatch.setattr(loading, "capability", lambda: capability)
    with caplog.at_level(logging.INFO, "tracker"):
        kernel = native.load()
    assert "built, once" in said(caplog)
    assert capability in said(caplog)
    monkeypatch.setattr(stream, "kernel", lambda: kernel)
    for name in ("mean 1e4, std 1e-2", "jump within a batch", "bfloat16", "float16"):
        x = torch.cat(STREAMS[name])
        expected, actual = oracle.activity(x), observe(x, 1, 0.01, Scratch()).value()
        np.testing.assert_allclose(actual.variance, expected["variance"], rtol=1e-6)
        np.testing.assert_array_equal(actual.maximum, expected["maximum"])
    for x, axis in AWKWARD.values():
        ours = accumulated([x], axis, monkeypatch)
        same(ours, accumulated([x], axis, monkeypatch, by_torch=True))
    monkeypatch.setattr(covariance, "kernel", lambda: kernel)
    for neurons, error in ((33, 1e-12), (150, 1e-6)):
        rows = torch.randn(700, neurons, generator=torch.Generator().manual_seed(0))
        centred = rows.double() - rows.double().mean(0)
        expected = centred.T @ centred
        found = Covariance.of(rows)
        assert (found.comoment - expected).abs().max() < error * expected.abs().max()
        assert found.pairs_above(0.05) == Covariance(
            found.count, found.mean, found.comoment.T
        ).pairs_above(0.05)  # by torch: it is not contiguous


def test_the_switch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    with caplog.at_level(logging.INFO, "tracker"):
        assert native.load() is None
    assert native.SWITCH in said(caplog)


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    with caplog.at_level(logging.INFO, "tracker"):
        assert native.load() is None
    assert "no C++ compiler was found" in said(caplog)


# What follows writes to what comes after -o.
OUTPUT = "echo 1.0; out=/dev/null; while [ $# -gt 1 ]; do [ $1 = -o ] && out=$2; shift; done;"


@needs_posix
@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "echo 1.0; echo loud complaints >&2; exit 3",
        f"{OUTPUT} echo rubbish > $out",
        f"{OUTPUT} printf '#!/bin/sh\\nkill -11 $$' > $out; chmod +x $out",
        f"{OUTPUT} printf '#!/bin/sh\\nexit 0' > $out; chmod +x $out",
    ],
    ids=["fails", "complains", "writes rubbish", "its code crashes", "its library is none"],
)
def test_with_a_broken_compiler(
    script: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Torch answers, nothing is left behind that would be loaded, and the user's terminal stays clean."""
    tools = fresh.parent / "bin"
    tools.mkdir()
    (tools / "c++").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "c++").chmod(0o755)
    for name in ("sh", "chmod"):
        (tools / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    with caplog.at_level(logging.INFO, "tracker"):
        assert native.load() is None
    assert "without compiled code" in said(caplog)
    assert capfd.readouterr() == ("", "")
    assert not list((fresh / "tracker-kernels").glob("build-*"))


@needs_compiler
def test_without_a_place_to_keep_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("a file, where a directory is needed")
    with caplog.at_level(logging.INFO, "tracker"):
        assert native.load() is None
    assert "cache" in said(caplog)


@needs_compiler
@needs_posix
def test_a_place_that_others_can_write_to_is_not_trusted(fresh: Path) -> None:
    directory = build.cache_directory()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o777)
    with pytest.raises(build.UnavailableError, match="only this user"):
        build.library()


@needs_kernel
@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "changed", "of others"])
def test_a_damaged_file_is_built_anew(damage: str, fresh: Path) -> None:
    """It is never loaded: that could end the process."""
    path, built = build.library()
    assert built
    assert build.library() == (path, False)
    content = path.read_bytes()
    if damage == "of others":
        if sys.platform == "win32":
            pytest.skip("modes of POSIX")
        path.chmod(0o777)
    else:
        path.write_bytes(content[:2000] if damage == "cut short" else content[:-1] + b"!")
    again, built = build.library()
    assert built
    assert again.name == build._name(again.name.split("-")[0], again.read_bytes())
    assert native.load() is not None


@needs_kernel
@needs_compiler
def test_two_processes_build_at_once(fresh: Path) -> None:
    """Both get a whole kernel."""
    code = "from tracker.statistics import native; assert native.kernel() is not None"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=ROOT, env=dict(os.environ)) for _ in range(2)]
    assert [p.wait(timeout=100) for p in running] == [0, 0]
    left = sorted((fresh / "tracker-kernels").iterdir()) if sys.platform == "linux" else []
    assert all(path.suffix == ".so" for path in left)


def test_an_engine_by_torch_alone() -> None:
    """From import to report, with the switch off, warnings as errors."""
    code = """
import torch
from tracker import NeuronEngine
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
engine = NeuronEngine()
engine.track_model(model)
engine.start_tracking(enable_correlation_analysis=True)
for batch in torch.randn(20, 8, 6):
    model(batch)
assert engine.get_neuron_stats(0)["observations"] == 160
"""
    environment = {**os.environ, native.SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_kernel
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("neurons", [1, 2, 63, 200])
def test_both_paths_find_the_same_pairs(
    neurons: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant neurons and twins among them; more pairs than there is room for at first."""
    rows = torch.randn(50, neurons, generator=torch.Generator().manual_seed(neurons))
    rows[:, ::7] = 2.0
    rows[:, 1::9] = rows[:, :1] if neurons > 1 and threshold else rows[:, 1::9]
    value = Covariance.of(rows)
    ours = value.pairs_above(threshold)
    with monkeypatch.context() as patch:
        patch.setattr(covariance, "kernel", lambda: None)
        theirs = value.pairs_above(threshold)
    assert ours == theirs
    assert threshold or neurons < 200 or len(ours) > 4096


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 5, 1), (40, 17, 9), (7, 128, 80)], ids=str)
def test_narrow_products_are_those_of_float64(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """What depends exactly leaves no more unexplained than float64 rounds; maps and rows, all types."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    stream = CovarianceStream(shape[1])
    for part in x.split(13):
        stream.add(part, part.double().mean((0, 2)), axis=1)
    rows = x.double().transpose(1, 2).flatten(0, 1)
    centred = rows - rows.mean(0)
    expected = centred.T @ centred
    error = (stream.value().comoment - expected).abs().max() / expected.abs().max()
    assert error < 1e-12


BEYOND = """
import torch
from tracker.statistics import native
kernel, x = native.kernel(), torch.randn(64, 40)
table = torch.zeros(9 * 40 - 4, dtype=torch.float64)
assert kernel is not None
place = table.data_ptr()
kernel.reduce(x.data_ptr(), 0, 64, 40, 1, 40, 0.5, place, None, 1, None)
print("nobody noticed")
"""


@pytest.mark.skipif("asan" not in os.environ.get("LD_PRELOAD", ""), reason="see `make asan`")
def test_the_sanitizer_sees_what_is_written_beyond_a_table() -> None:
    assert native.kernel() is not None
    done = subprocess.run(
        [sys.executable, "-c", BEYOND], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "heap-buffer-overflow" in done.stderr
    assert "tracker_activity" in done.stderr
    assert "nobody noticed" not in done.stdout

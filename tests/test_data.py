"""Fashion-MNIST: which source is used, and what is refused."""

import gzip
import hashlib
import http.server
import shutil
import socket
import struct
import sys
import threading
import time
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from data import fashion_mnist, make_sample
from data.fashion_mnist import (
    FULL_SET,
    SAMPLE,
    SAMPLE_SET,
    SYSTEM_COPY,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    DataError,
    load_fashion_mnist,
    normalised,
)

needs_full_set = pytest.mark.skipif(
    not SYSTEM_COPY.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


def no_network(root):
    raise URLError("no route to host")


def never(root):
    raise AssertionError("no download should be tried")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST_OFFLINE", raising=False)


@pytest.fixture
def load(tmp_path):
    """The loader, looking into empty folders only; the sample is the real one."""
    places = {"root": tmp_path / "data", "system_copy": tmp_path / "system", "fetch": no_network}
    return lambda **changed: load_fashion_mnist(**places | changed)


@pytest.fixture
def sample(tmp_path):
    """A copy of the embedded sample, to be damaged."""
    return shutil.copytree(SAMPLE, tmp_path / "sample")


def copy_full_set(folder, plain=False):
    folder.mkdir(parents=True)
    for name in FULL_SET:
        packed = SYSTEM_COPY / f"{name}.gz"
        if plain:
            (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            shutil.copy(packed, folder)
    return folder


def rewrite(path, change):
    """Replace the content of a gzipped file by `change(content)`."""
    content = change(bytearray(gzip.decompress(path.read_bytes())))
    path.write_bytes(gzip.compress(bytes(content)))


class TestSample:
    def test_is_stratified(self, load):
        data = load()
        assert data.is_sample
        assert torch.bincount(data.train_labels).tolist() == [500] * 10
        assert torch.bincount(data.test_labels).tolist() == [100] * 10

    def test_shapes_and_types(self, load):
        data = load()
        assert data.train_images.shape == (5_000, 28, 28)
        assert data.test_images.shape == (1_000, 28, 28)
        assert data.train_images.dtype == data.test_images.dtype == torch.uint8
        assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
        assert len(data.classes) == 10

    def test_is_small(self):
        assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 3_000_000

    def test_has_the_known_content_and_its_licence(self):
        for name, expected in SAMPLE_SET.items():
            content = gzip.decompress((SAMPLE / f"{name}.gz").read_bytes())
            assert hashlib.sha256(content).hexdigest() == expected.sha256
        licence = (SAMPLE / "LICENSE").read_text()
        assert "MIT" in licence
        assert "2017 Zalando SE" in licence

    @needs_full_set
    def test_can_be_made_again_byte_for_byte(self, tmp_path):
        full = load_fashion_mnist(tmp_path, fetch=never)
        for folder in ("once", "twice"):
            hashes = make_sample.make_sample(full, tmp_path / folder)
            assert hashes == {name: expected.sha256 for name, expected in SAMPLE_SET.items()}
        for file in (tmp_path / "once").iterdir():
            assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()

    @needs_full_set
    def test_script_prints_sizes_and_hashes(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["make_sample", "--out", str(tmp_path)])
        make_sample.main()
        printed = capsys.readouterr().out
        assert all(expected.sha256 in printed for expected in SAMPLE_SET.values())

    def test_is_not_made_from_itself(self, load, tmp_path):
        with pytest.raises(DataError, match="only a sample was found"):
            make_sample.make_sample(load(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_seed_is_another_choice(self):
        labels = np.repeat(np.arange(10), 50)
        chosen = [
            make_sample.stratified(labels, 5, np.random.RandomState(seed)) for seed in (0, 0, 1)
        ]
        assert np.array_equal(chosen[0], chosen[1])
        assert not np.array_equal(chosen[0], chosen[2])
        assert np.bincount(labels[chosen[2]]).tolist() == [5] * 10


class TestNormalised:
    def test_shapes(self, load):
        images = load().test_images
        assert normalised(images).shape == (1_000, 1, 28, 28)
        assert normalised(images, flatten=True).shape == (1_000, 784)

    def test_values(self):
        images = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 392).view(1, 28, 28)
        values = normalised(images, flatten=True)[0, :2]
        assert values.tolist() == pytest.approx([-0.2860 / 0.3530, (1 - 0.2860) / 0.3530])
        assert images.unique().tolist() == [0, 255]  # the input is left alone

    def test_sample_is_centred(self, load):
        values = normalised(load().train_images)
        assert values.mean().item() == pytest.approx(0, abs=0.02)
        assert values.std().item() == pytest.approx(1, abs=0.02)


class TestOrder:
    @needs_full_set
    @pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "gz"])
    def test_root_comes_first(self, load, tmp_path, place, plain):
        copy_full_set(tmp_path / "data" / place, plain)
        data = load(system_copy=SYSTEM_COPY, fetch=never)
        assert data.source == f"{tmp_path / 'data'} (full set)"
        assert not data.is_sample
        assert data.train_images.shape == (60_000, 28, 28)
        assert torch.bincount(data.test_labels).tolist() == [1_000] * 10

    @needs_full_set
    def test_system_copy_comes_second(self, load):
        data = load(system_copy=SYSTEM_COPY, fetch=never)
        assert data.source == "system copy /usr/share/datasets/fashion-mnist"
        assert not data.is_sample

    @needs_full_set
    def test_download_comes_third_and_stays(self, load, tmp_path):
        data = load(fetch=lambda root: copy_full_set(root / "FashionMNIST" / "raw"))
        assert data.source == "torchvision download"
        assert not data.is_sample
        assert load(fetch=never).source == f"{tmp_path / 'data'} (full set)"

    def test_sample_comes_last_and_says_why(self, load):
        source = load().source
        assert source.startswith("embedded sample (5,000 train / 1,000 test)")
        assert "no route to host" in source

    def test_download_can_be_left_out(self, load):
        assert "no download asked for" in load(download=False, fetch=never).source

    def test_environment_variable_switches_download_off(self, load, monkeypatch):
        monkeypatch.setenv("FASHION_MNIST_OFFLINE", "1")
        assert "FASHION_MNIST_OFFLINE is set" in load(fetch=never).source

    def test_download_that_brings_nothing_is_told(self, load):
        assert "nothing arrived" in load(fetch=lambda root: None).source


class TestDownload:
    """torchvision's download, from servers on this machine."""

    @pytest.fixture(autouse=True)
    def direct(self, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    @pytest.fixture
    def mirror(self, monkeypatch):
        """A function that lets torchvision download from a port of this machine."""
        source = pytest.importorskip("torchvision.datasets").FashionMNIST
        return lambda port: monkeypatch.setattr(source, "mirrors", [f"http://127.0.0.1:{port}/"])

    @pytest.fixture
    def download(self, load, tmp_path):
        def timed():
            start = time.monotonic()
            data = load(fetch=fashion_mnist.fetch_with_torchvision)
            assert time.monotonic() - start < 5
            return data

        return timed

    def test_refused_connection(self, mirror, download, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        mirror(port)  # nobody listens there any more
        assert "download failed" in download().source
        assert not (tmp_path / "data").exists()

    def test_silent_server(self, mirror, download, monkeypatch):
        monkeypatch.setattr(fashion_mnist, "ANSWER_SECONDS", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as server:
            mirror(server.getsockname()[1])
            assert "no answer from" in download().source

    @pytest.fixture
    def serve(self, mirror):
        """A function that serves a folder as torchvision's mirror."""
        servers = []

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = False  # closing waits for the answers under way

            def handle_error(self, *arguments):
                pass  # torchvision asks for a file first without reading it

        def start(folder):
            handler = partial(Quiet, directory=folder)
            servers.append(Server(("127.0.0.1", 0), handler))
            threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
            mirror(servers[-1].server_port)

        yield start
        for server in servers:
            server.shutdown()
            server.server_close()

    def test_missing_file(self, serve, download, tmp_path):
        serve(tmp_path)
        assert "404" in download().source

    def test_broken_file_leaves_nothing_behind(self, serve, download, sample, tmp_path):
        serve(sample)  # right names, wrong content
        assert "corrupted" in download().source
        assert list((tmp_path / "data").iterdir()) == []

    @needs_full_set
    def test_whole_set(self, serve, download, monkeypatch, tmp_path):
        from torchvision.datasets import FashionMNIST

        # Debian compressed the files anew, so their archives have other hashes.
        packed = [SYSTEM_COPY / f"{name}.gz" for name in FULL_SET]
        resources = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in packed]
        monkeypatch.setattr(FashionMNIST, "resources", resources)
        serve(SYSTEM_COPY)
        assert download().source == "torchvision download"
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["FashionMNIST"]


class TestRefusals:
    """Files that are there and not right; each message names the file and says what to do."""

    @pytest.fixture
    def refused(self, load, sample):
        """A function that loads the damaged sample and returns the message of its refusal."""

        def message(name):
            with pytest.raises(DataError, match="remove all four files") as caught:
                load(sample=sample)
            assert f"{name}.gz" in str(caught.value)
            return str(caught.value)

        return message

    @pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -4])
    def test_truncated_archive(self, sample, refused, kept):
        path = sample / f"{TRAIN_IMAGES}.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
        assert "found" in refused(TRAIN_IMAGES)

    def test_not_an_archive(self, sample, refused):
        (sample / f"{TEST_LABELS}.gz").write_text("<html>404 not found</html>")
        assert "Not a gzipped file" in refused(TEST_LABELS)

    @pytest.mark.parametrize("position", [12, 3_000, -6])
    def test_archive_with_an_altered_byte(self, sample, refused, position):
        path = sample / f"{TEST_IMAGES}.gz"
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        refused(TEST_IMAGES)

    def test_altered_content(self, sample, refused):
        def flip(content):
            content[-1] ^= 1
            return content

        rewrite(sample / f"{TRAIN_LABELS}.gz", flip)
        message = refused(TRAIN_LABELS)
        assert "altered" in message
        assert SAMPLE_SET[TRAIN_LABELS].sha256 in message

    def test_wrong_magic_number(self, sample, refused):
        rewrite(sample / f"{TRAIN_IMAGES}.gz", lambda content: b"\0\0\x0d\x03" + content[4:])
        assert "magic number 00000d03, expected 00000803" in refused(TRAIN_IMAGES)

    def test_labels_in_place_of_images(self, sample, refused):
        shutil.copy(sample / f"{TRAIN_LABELS}.gz", sample / f"{TRAIN_IMAGES}.gz")
        assert "magic number 00000801" in refused(TRAIN_IMAGES)

    @pytest.mark.parametrize("sizes", [(5_001, 28, 28), (2**32 - 1,) * 3, (0, 28, 28)])
    def test_wrong_claimed_sizes(self, sample, refused, sizes):
        header = b"\0\0\x08\x03" + struct.pack(">3I", *sizes)
        rewrite(sample / f"{TRAIN_IMAGES}.gz", lambda content: header + content[16:])
        assert f"claims the sizes {sizes}, expected (5000, 28, 28)" in refused(TRAIN_IMAGES)

    def test_header_cut_short(self, sample, refused):
        rewrite(sample / f"{TRAIN_IMAGES}.gz", lambda content: content[:10])
        assert "claims the sizes (5000,)" in refused(TRAIN_IMAGES)

    def test_less_content_than_claimed(self, sample, refused):
        rewrite(sample / f"{TEST_LABELS}.gz", lambda content: content[:-1])
        assert "1,007 bytes of content, expected 1,008" in refused(TEST_LABELS)

    def test_more_content_than_claimed(self, sample, refused):
        rewrite(sample / f"{TEST_LABELS}.gz", lambda content: content + bytes(10**6))
        assert "more than 1,008 bytes of content" in refused(TEST_LABELS)

    def test_missing_sample(self, load, tmp_path):
        with pytest.raises(DataError, match="git checkout"):
            load(sample=tmp_path / "nowhere")

    def test_foreign_files_in_root_are_not_passed_over(self, load, sample):
        with pytest.raises(DataError, match="claims the sizes"):
            load(root=sample, system_copy=SYSTEM_COPY, fetch=never)

    def test_foreign_file_of_the_right_shape(self, load, sample):
        content = b"\0\0\x08\x03" + struct.pack(">3I", 60_000, 28, 28) + bytes(60_000 * 784)
        (sample / TRAIN_IMAGES).write_bytes(content)
        with pytest.raises(DataError, match="another data set in the same format"):
            load(root=sample, fetch=never)

    def test_incomplete_root_is_not_passed_over(self, load, sample):
        (sample / f"{TEST_IMAGES}.gz").unlink()
        with pytest.raises(DataError, match=f"found 3 of the 4 files.*{TEST_IMAGES}"):
            load(root=sample, system_copy=SYSTEM_COPY, fetch=never)

    def test_folder_in_place_of_a_file(self, load, sample):
        (sample / TRAIN_IMAGES).mkdir()
        with pytest.raises(DataError, match="readable file"):
            load(root=sample, fetch=never)

    def test_dangling_link(self, load, sample):
        Path(sample / TRAIN_IMAGES).symlink_to(sample / "gone")
        with pytest.raises(DataError, match="readable file"):
            load(root=sample, fetch=never)

    def test_foreign_files_in_the_system_copy_are_not_passed_over(self, load, sample):
        with pytest.raises(DataError, match="claims the sizes"):
            load(system_copy=sample, fetch=never)

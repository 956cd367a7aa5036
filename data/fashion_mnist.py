"""Fashion-MNIST as tensors, from the first place that has it.

The places, in order: `data/` (the IDX files themselves, or `FashionMNIST/raw` as torchvision leaves
it), Debian's package `dataset-fashion-mnist`, torchvision's download, and the sample that comes
with this repository. Every file is checked against the known content before it is used.
"""

import gzip
import hashlib
import math
import os
import queue
import shutil
import socket
import struct
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "sample"
SYSTEM_COPY = Path("/usr/share/datasets/fashion-mnist")
RAW = Path("FashionMNIST", "raw")  # where torchvision keeps the files, under its root

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.2860, 0.3530  # of the pixels of the training set, scaled to [0, 1]

ANSWER_SECONDS = 3.0  # how long an unreachable network may hold up a run
STALL_SECONDS = 10.0  # how long a download that has begun may stand still


class DataError(ValueError):
    """A data file that is damaged, foreign, altered or missing."""


@dataclass(frozen=True)
class Expected:
    """What one IDX file must hold: its shape, and the sha256 of its decompressed content.

    The content is hashed, not the archive: distributions compress the same content anew.
    """

    shape: tuple[int, ...]
    sha256: str

    @property
    def header_bytes(self) -> int:
        """Length of the header: four bytes of magic number, four for each dimension."""
        return 4 + 4 * len(self.shape)

    @property
    def total_bytes(self) -> int:
        """Length of the decompressed file."""
        return self.header_bytes + math.prod(self.shape)


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

FULL_SET = {
    TRAIN_IMAGES: Expected(
        (60_000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    TRAIN_LABELS: Expected(
        (60_000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    TEST_IMAGES: Expected(
        (10_000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    TEST_LABELS: Expected(
        (10_000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
# Printed by `python -m data.make_sample`.
SAMPLE_SET = {
    TRAIN_IMAGES: Expected(
        (5_000, 28, 28), "82de05688d0889971acf2966bd50f4c6d7bbf3a7caf08ec081d854941516eb2c"
    ),
    TRAIN_LABELS: Expected(
        (5_000,), "8798dcb2e77210f011765df801162353746267c21aded1d0631f90f41f1abdfc"
    ),
    TEST_IMAGES: Expected(
        (1_000, 28, 28), "8689ff8e43c2dd21e1dd1ff62d7a48bf05f26f7e980c826cb5b2f56ee6899ca3"
    ),
    TEST_LABELS: Expected(
        (1_000,), "3e97eeb68678a02c044cda0b2b2db4a266a2f44e9ad7e2cd9712f399754f2be7"
    ),
}


@dataclass(frozen=True, eq=False)
class FashionMNIST:
    """The images (n, 28, 28) as uint8, their labels (n,) as int64, and where they came from."""

    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    source: str
    is_sample: bool
    classes: tuple[str, ...] = field(default=CLASSES, repr=False)


def normalised(images: Tensor, flatten: bool = False) -> Tensor:
    """Images with mean 0 and variance 1 over the training set's pixels, as float32.

    images: (n, 28, 28) uint8; returns (n, 1, 28, 28), or (n, 784) with `flatten`.
    """
    shape = (-1, 784) if flatten else (-1, 1, 28, 28)
    floats = images.to(torch.float32, copy=True)
    return floats.div_(255).sub_(MEAN).div_(STD).view(shape)


def fetch_with_torchvision(root: Path) -> None:
    """Download the full set to `root`/FashionMNIST/raw; all files or none.

    Raises OSError or RuntimeError within seconds when the network cannot be reached.
    """
    # Imported here because it takes seconds, and only a download needs it.
    from torchvision.datasets import FashionMNIST as Source

    _require_answer(Source.mirrors[0] + Source.resources[0][0])
    root.mkdir(parents=True, exist_ok=True)
    # First to a folder of its own: what an interrupted download leaves would be refused later.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
        with _socket_timeout(STALL_SECONDS):
            Source(temporary, download=True)
        (root / RAW).mkdir(parents=True, exist_ok=True)
        for file in (Path(temporary) / RAW).iterdir():
            shutil.move(file, root / RAW / file.name)


def load_fashion_mnist(
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    *,
    system_copy: str | os.PathLike[str] = SYSTEM_COPY,
    sample: str | os.PathLike[str] = SAMPLE,
    fetch: Callable[[Path], None] = fetch_with_torchvision,
) -> FashionMNIST:
    """Read Fashion-MNIST from the first place that has it; `.source` says which.

    `root` is this repository's `data/` unless given; `fetch` downloads the files into it. Set
    FASHION_MNIST_OFFLINE=1 to never try a download. Without network the embedded sample serves.
    A file that is there and not right is a `DataError`: it is never passed over for the next place.
    """
    root, system_copy = Path(root) if root is not None else HERE, Path(system_copy)
    if files := _find(root):
        name = "data/" if root.resolve() == HERE else str(root)
        return _read_set(files, FULL_SET, f"{name} (full set)")
    if files := _find(system_copy):
        return _read_set(files, FULL_SET, f"system copy {system_copy}")
    obstacle = _try_download(root, fetch) if download else "no download asked for"
    if obstacle is None:
        return _read_set(_find(root), FULL_SET, "torchvision download")
    source = f"embedded sample (5,000 train / 1,000 test); {obstacle}"
    return _read_set(_find(Path(sample)), SAMPLE_SET, source)


def _find(folder: Path) -> dict[str, Path]:
    """Path of each of the four files in `folder`; empty if there is none of them."""
    found = {}
    for name in FULL_SET:
        # The plain file first: there is nothing to decompress.
        paths = [folder / sub / f"{name}{end}" for sub in ("", RAW) for end in ("", ".gz")]
        path = next(filter(os.path.lexists, paths), None)
        if path is not None:
            found[name] = path
    missing = [name for name in FULL_SET if name not in found]
    if found and missing:
        raise DataError(
            f"Cannot use {folder}: found {len(found)} of the 4 files of Fashion-MNIST, expected "
            f"also {', '.join(missing)} (plain or .gz). Add what is missing, or remove the others."
        )
    return found


def _read_set(
    files: Mapping[str, Path], known: Mapping[str, Expected], source: str
) -> FashionMNIST:
    if not files:
        raise DataError(
            f"Cannot use the {source}: found none of its files, expected them in data/sample. Get "
            f"them back with `git checkout data/sample`."
        )
    arrays = {name: _read_idx(files[name], known[name]) for name in known}
    return FashionMNIST(
        train_images=torch.from_numpy(arrays[TRAIN_IMAGES].copy()),
        train_labels=torch.from_numpy(arrays[TRAIN_LABELS].astype(np.int64)),
        test_images=torch.from_numpy(arrays[TEST_IMAGES].copy()),
        test_labels=torch.from_numpy(arrays[TEST_LABELS].astype(np.int64)),
        source=source,
        is_sample=known is SAMPLE_SET,
    )


def _read_idx(path: Path, expected: Expected) -> np.ndarray:
    """The checked content of one file: uint8, of the expected shape."""
    content = _content(path, expected.total_bytes)
    _check_header(path, content, expected)
    _check_length(path, content, expected)
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        found = f"content with sha256 {digest} (altered, or another data set in the same format)"
        raise _refusal(path, found, expected.sha256)
    return np.frombuffer(content, np.uint8, offset=expected.header_bytes).reshape(expected.shape)


def _content(path: Path, limit: int) -> bytes:
    """The decompressed file, or its first `limit` + 1 bytes: an archive may hold any amount."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return file.read(limit + 1)
    except (EOFError, OSError, zlib.error) as error:
        kind = "complete gzip archive" if path.suffix == ".gz" else "readable file"
        raise _refusal(path, f"damage ({error})", f"a {kind}") from error


def _check_header(path: Path, content: bytes, expected: Expected) -> None:
    magic = bytes((0, 0, 8, len(expected.shape)))  # 8: unsigned bytes
    if content[:4] != magic:
        start = content[:4].hex() or "nothing"
        raise _refusal(path, f"magic number {start}", f"{magic.hex()} (IDX, unsigned bytes)")
    sizes = content[4 : expected.header_bytes]
    if sizes != struct.pack(f">{len(expected.shape)}I", *expected.shape):
        claimed = struct.unpack(f">{len(sizes) // 4}I", sizes[: len(sizes) // 4 * 4])
        raise _refusal(path, f"a header that claims the sizes {claimed}", f"{expected.shape}")


def _check_length(path: Path, content: bytes, expected: Expected) -> None:
    found, right = len(content), expected.total_bytes
    if found != right:
        size = f"{found:,}" if found < right else f"more than {right:,}"
        raise _refusal(path, f"{size} bytes of content", f"{right:,}")


def _refusal(path: Path, found: str, expected: str) -> DataError:
    return DataError(
        f"Cannot use {path} as Fashion-MNIST: found {found}, expected {expected}. Put the original "
        f"file in its place (for the sample: `git checkout data/sample`), or remove all four files "
        f"to have the next source used."
    )


def _try_download(root: Path, fetch: Callable[[Path], None]) -> str | None:
    """Download the set into `root`. Returns what stood in the way, or None."""
    if os.environ.get("FASHION_MNIST_OFFLINE", "0") not in ("", "0"):
        return "no download, FASHION_MNIST_OFFLINE is set"
    try:
        fetch(root)
    except (ImportError, OSError, RuntimeError, HTTPException) as error:
        return f"download failed: {' '.join(str(error).split())}"
    return None if _find(root) else f"download failed: nothing arrived in {root}"


def _require_answer(url: str) -> None:
    """Raise OSError unless the server answers in time.

    In a thread, because looking up a host name knows no timeout.
    """
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
            answers.put(None)
        except HTTPError as error:
            error.close()  # it holds the connection
            answers.put(error)
        except (OSError, HTTPException) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer from {url} within {ANSWER_SECONDS:g} s") from None
    if isinstance(
        getattr(error, "reason", error), TimeoutError
    ):  # the socket's own clock was first
        raise TimeoutError(f"no answer from {url} within {ANSWER_SECONDS:g} s") from error
    if error is not None:
        raise error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """For torchvision, which opens its connections with no timeout but the process's default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Make the embedded sample from the full set: `python -m data.make_sample`.

Writes `data/sample/*.gz`, in the format of the originals, and prints the hashes that
`data.fashion_mnist.SAMPLE_SET` holds. The same seed gives the same bytes.
"""

import argparse
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from data.fashion_mnist import (
    SAMPLE,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    DataError,
    FashionMNIST,
    load_fashion_mnist,
)

TRAIN_PER_CLASS, TEST_PER_CLASS = 500, 100


def stratified(labels: np.ndarray, per_class: int, rng: np.random.RandomState) -> np.ndarray:
    """Indices (classes * per_class,) of as many random items of each class, in ascending order."""
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


def write_idx(path: Path, array: np.ndarray) -> str:
    """Write a uint8 array as a gzipped IDX file; returns the sha256 of the content."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
    # No file name and no time in the archive: the bytes depend on the content alone.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def make_sample(full: FashionMNIST, folder: Path, seed: int = 0) -> dict[str, str]:
    """Write the four files of the sample to `folder`; returns the sha256 of each content."""
    if full.is_sample:
        raise DataError(
            f"Cannot make the sample: only a sample was found ({full.source}). Put the full set "
            f"into data/ or install Debian's package dataset-fashion-mnist."
        )
    # The old generator on purpose: NumPy has frozen its stream, so the choice will not change.
    rng = np.random.RandomState(seed)
    train = stratified(full.train_labels.numpy(), TRAIN_PER_CLASS, rng)
    test = stratified(full.test_labels.numpy(), TEST_PER_CLASS, rng)
    arrays = {
        TRAIN_IMAGES: full.train_images.numpy()[train],
        TRAIN_LABELS: full.train_labels.numpy()[train].astype(np.uint8),
        TEST_IMAGES: full.test_images.numpy()[test],
        TEST_LABELS: full.test_labels.numpy()[test].astype(np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_idx(folder / f"{name}.gz", array) for name, array in arrays.items()}


def main() -> None:
    """Make the sample and print its hashes."""
    parser = argparse.ArgumentParser(description="Make the embedded sample of Fashion-MNIST.")
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    full = load_fashion_mnist()
    print(f"From: {full.source}")
    for name, digest in make_sample(full, options.out, options.seed).items():
        size = (options.out / f"{name}.gz").stat().st_size
        print(f"{name}  {size:>9,} bytes  sha256 of the content {digest}")


if __name__ == "__main__":
    main()

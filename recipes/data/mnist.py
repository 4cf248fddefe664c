"""MNIST and Fashion-MNIST, from `<root>/<MNIST or FashionMNIST>/raw`; each file plain or gzipped."""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from recipes.data.packs import Part, Parts
from recipes.data.sets import DataError, MissingDataError
from recipes.data.sources import Source

FILES = tuple(
    f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
)  # fmt: skip
LIMIT = 1 << 30  # bytes of one file; the largest, 60,000 images of 28 × 28, has 47 million
CLASSES = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A file of unsigned bytes in the IDX format (LeCun et al. 1998), which may be gzipped, as an `ndim`-d array."""
    start = 4 + 4 * ndim
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(start)
            if header[:4] != bytes([0, 0, 8, ndim]) or len(header) < start:
                raise DataError(f"{path} is not an IDX file of bytes in {ndim} dimension(s)")
            shape = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, start, 4))
            values = math.prod(shape)
            if values > LIMIT:
                raise DataError(f"{path} is damaged: its header says {shape}, more than any of these sets has")
            body = np.frombuffer(file.read(values + 1), np.uint8)  # a little file may decompress to any size
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if body.size != values:
        found = body.size if body.size < values else f"more than {values}"
        raise DataError(f"{path} is damaged: {found} values, its header says {shape}")
    return body.reshape(shape)


def _files(root: Path, folder: str) -> list[Path]:
    raw = root / folder / "raw"
    found = []
    for name in FILES:
        there = [path for path in (raw / name, raw / f"{name}.gz") if path.is_file()]
        if not there:
            raise MissingDataError(f"no {name} (or {name}.gz) in {raw}")
        found.append(there[0])
    return found


def _read(root: Path, size: int | None, folder: str) -> Parts:
    paths = _files(root, folder)
    parts = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels) or labels.max(initial=0) > 9:
            raise DataError(f"{images_path} and {labels_path} do not belong together")
        parts.append(Part.of(images[:, None], labels.astype(np.int64)))
    return Parts(CLASSES[folder], *parts)


def _download(root: Path, folder: str) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    published = getattr(datasets, folder)
    for name, md5 in published.resources:
        problems = []
        for mirror in published.mirrors:
            try:
                download_url(mirror + name, str(root / folder / "raw"), name, md5)
                break
            except (OSError, RuntimeError) as error:
                problems.append(f"{mirror}{name}: {error}")
        else:
            raise RuntimeError("; ".join(problems))


def _source(folder: str, home: str) -> Source:
    return Source(
        read=functools.partial(_read, folder=folder),
        files=functools.partial(_files, folder=folder),
        wanted=f"{', '.join(FILES)} (each as it is or with .gz; from {home}) in {{root}}/{folder}/raw",
        augment="none",
        download=functools.partial(_download, folder=folder),
    )


SOURCES = {
    "mnist": _source("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": _source("FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist"),
}

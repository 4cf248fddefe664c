"""Folders of images, `train/<class>/*` and `val/<class>/*`: Tiny-ImageNet, ImageNet, or one's own.

Images are decoded and resized once, when they are packed: the shorter side to `size` pixels, then the middle square.
`val`, which is what such data sets are compared on, becomes the test set.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data.packs import Part, Parts
from recipes.data.sets import DataError, MissingDataError
from recipes.data.sources import Source

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
# Decoded by content, whatever the name says; PostScript, which Pillow would hand to an interpreter, is not among them.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def read_image(path: Path, size: int) -> np.ndarray:
    """One image as uint8 [3, size, size]: the shorter side resized to `size`, the middle cut out."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (2 * size, 2 * size))  # lets the JPEG decoder skip what resizing would throw away
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    width, height = rgb.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)  # Pillow's averages when it shrinks
    return np.asarray(rgb).transpose(2, 0, 1)


def _classes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingDataError(f"there is no folder {folder}")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise MissingDataError(f"no folder of a class in {folder}")
    return found


def _annotated(root: Path) -> Path | None:
    """Tiny-ImageNet as published keeps its validation images in one folder, with their classes in a text file."""
    path = root / "val" / "val_annotations.txt"
    return path if path.is_file() else None


def _images(folder: Path) -> list[Path]:
    # Tiny-ImageNet as published has one more level: train/<class>/images/*.
    inner = folder / "images"
    with os.scandir(inner if inner.is_dir() else folder) as entries:
        found = sorted(e.path for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file())
    if not found:
        raise DataError(f"no image in {folder} (of the kinds {', '.join(EXTENSIONS)})")
    return [Path(path) for path in found]


def _listed(annotations: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        if not rest or Path(name).name != name or name in ("", ".", ".."):
            raise DataError(f"{annotations}, line {number}: {line!r} is not a file's plain name, a tab and its class")
        yield annotations.parent / "images" / name, rest.split("\t")[0]


def _part(paths: list[Path], labels: list[int], size: int) -> Part:
    def read(places: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing leave Python's lock alone
            return np.stack(list(pool.map(lambda place: read_image(paths[place], size), places.tolist())))

    return Part(np.array(labels, np.int64), (3, size, size), read)


def _read(root: Path, size: int | None, folder: str) -> Parts:
    assert size is not None  # every source here has a default
    root = root / folder
    classes = [path.name for path in _classes(root / "train")]
    index = {name: label for label, name in enumerate(classes)}
    train: list[tuple[Path, str]] = [(path, name) for name in classes for path in _images(root / "train" / name)]
    annotations = _annotated(root)
    test = (
        list(_listed(annotations))
        if annotations
        else [(path, inner.name) for inner in _classes(root / "val") for path in _images(inner)]
    )
    for path, name in test:
        if name not in index:
            raise DataError(f"{path} is of class {name!r}, which {root / 'train'} does not have")
    parts = (_part([path for path, _ in part], [index[name] for _, name in part], size) for part in (train, test))
    return Parts(tuple(classes), *parts)


def _files(root: Path, folder: str) -> list[Path]:
    # A folder's own date changes with its entries, so there is no need to look at a million files.
    root = root / folder
    found = []
    for path in [*_classes(root / "train"), *([] if _annotated(root) else _classes(root / "val"))]:
        inner = path / "images"
        found.append(inner if inner.is_dir() else path)
    annotations = _annotated(root)
    return found + ([annotations, root / "val" / "images"] if annotations else [])


def _download_tiny(root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", str(root), md5="90528d7ca1a48142e341f4ef8d21d0de"
    )


def _source(folder: str, wanted: str, size: int = 64) -> Source:
    return Source(
        read=functools.partial(_read, folder=folder),
        files=functools.partial(_files, folder=folder),
        wanted=wanted,
        augment="crop-flip",
        size=size,
        download=_download_tiny if folder == "tiny-imagenet-200" else None,
    )


SOURCES = {
    "tiny-imagenet": _source(
        "tiny-imagenet-200",
        "train/<class>/*.JPEG and val/<class>/*.JPEG, or the contents of "
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip, in {root}/tiny-imagenet-200",
    ),
    "imagenet": _source(
        "imagenet",
        "train/<class>/*.JPEG and val/<class>/*.JPEG (ILSVRC 2012, from https://image-net.org after registering) in "
        "{root}/imagenet",
    ),
    "folder": _source("", "train/<class>/* and val/<class>/* in {root}"),
}

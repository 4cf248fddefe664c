"""STL-10's labelled images, 96 × 96 in ten classes, from `<root>/stl10_binary`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.data.packs import Part, Parts
from recipes.data.sets import DataError, MissingDataError
from recipes.data.sources import Source

FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
BYTES = 3 * 96 * 96


def _files(root: Path) -> list[Path]:
    paths = [root / "stl10_binary" / name for name in FILES]
    for path in paths:
        if not path.is_file():
            raise MissingDataError(f"no {path.name} in {path.parent}")
    return paths


def _part(images_path: Path, labels_path: Path) -> Part:
    pixels, labels = np.fromfile(images_path, np.uint8), np.fromfile(labels_path, np.uint8).astype(np.int64) - 1
    if pixels.size != len(labels) * BYTES:
        raise DataError(
            f"{images_path} is damaged: {pixels.size} bytes are not {BYTES} for each of {len(labels)} labels"
        )
    if not set(np.unique(labels)) <= set(range(10)):
        raise DataError(f"{labels_path} is damaged: labels must be 1 to 10")
    return Part.of(pixels.reshape(-1, 3, 96, 96).swapaxes(2, 3), labels)  # columns come first in the file


def _read(root: Path, size: int | None) -> Parts:
    train_x, train_y, test_x, test_y = _files(root)
    return Parts(CLASSES, _part(train_x, train_y), _part(test_x, test_y))


def _download(root: Path) -> None:
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(STL10.url, str(root), filename=STL10.filename, md5=STL10.tgz_md5)


SOURCES = {
    "stl10": Source(
        read=_read,
        files=_files,
        wanted=f"{', '.join(FILES)} (from http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz) in "
        "{root}/stl10_binary",
        augment="crop-flip",
        download=_download,
    )
}

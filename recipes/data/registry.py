"""Data sets by name."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from tqdm import tqdm

from ap.names import unknown
from recipes.data import cifar, digits, folders, mnist, stl10
from recipes.data.packs import DamagedPackError, locked, read_pack, write_pack
from recipes.data.sets import DataError, ImageData, MissingDataError, Whole
from recipes.data.sources import Source

SOURCES: dict[str, Source] = {**mnist.SOURCES, **cifar.SOURCES, **stl10.SOURCES, **folders.SOURCES}
VAL = 0.1  # the share of the training images that is held out unless told otherwise


def names() -> list[str]:
    """The data sets that `load` knows.

    >>> "digits" in names() and "cifar10" in names()
    True
    """
    return ["digits", *sorted(SOURCES)]


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    val: int | float | None = None,
    size: int | None = None,
) -> ImageData:
    """The data set `name`, split into train, validation and test.

    `root` is the folder below which torchvision would look for it, `$AP_DATA` or `data` if not given; "folder" takes
    `root/train/<class>/*` and `root/val/<class>/*`. Files are fetched only with `download=True`. The first use packs
    them into one file of bytes in `root/packed`; later uses map that file.

    `val` images (int) or that share of them (float) are held out of the training set for validation, stratified by
    class and always the same ones; by default a tenth, and 200 of the digits' 1,400. Images of folders are resized to
    `size` × `size` pixels, 64 if not given; those of other sets can be shrunk to a divisor of their side. The digits
    need no files.

    Raises MissingDataError (a FileNotFoundError) that says which files to put where, and DataError (a ValueError) for
    an unknown name, a damaged file or a `val` that is too large.

    >>> data = load("digits")
    >>> len(data.train), len(data.val), len(data.test), tuple(data.train.images.shape)
    (1200, 200, 397, (1200, 1, 8, 8))
    """
    if name not in names():
        hint = ": for a folder of images, the name is 'folder' and its path the root" if "/" in name else ""
        raise DataError(f"{unknown('data set', name, names())}{hint}")
    if size is not None and size < 1:
        raise DataError(f"{name}: size must be at least 1 pixel, not {size}")
    if size is not None and (name not in SOURCES or SOURCES[name].size is None):
        data = load(name, root, download, val)
        return data if size == data.image_size else data.shrunk(size)
    if name == "digits":
        return digits.load_digits().split(name, digits.VAL if val is None else val, "none")
    source = SOURCES[name]
    folder = Path(root if root is not None else os.environ.get("AP_DATA") or "data").expanduser()
    whole = _packed(name, source, folder, download, size or source.size)
    return whole.split(name, VAL if val is None else val, source.augment)


def _packed(name: str, source: Source, root: Path, download: bool, size: int | None) -> Whole:
    """The pack if it is good, and a new one if it is missing, damaged or older than its files."""
    path = root / "packed" / f"{name}{f'-{size}' if size else ''}.safetensors"
    missing: MissingDataError | None = None
    stamp: str | None = None
    try:
        stamp = _stamp(source.files(root))
    except MissingDataError as error:
        missing = error  # no matter where there is a pack: it may have been copied alone
    try:
        whole = read_pack(path, stamp)
        if whole is not None:
            return whole
    except FileNotFoundError:
        pass
    except DamagedPackError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=3)
    if missing is not None:
        _fetch(name, source, root, download, missing)
        stamp = _stamp(source.files(root))
    try:
        return _pack(name, source, root, path, stamp or "", size)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{name}: cannot make {path}: {error}. The data folder must be one that can be written; the files "
            "themselves may be links"
        ) from error


def _pack(name: str, source: Source, root: Path, path: Path, stamp: str, size: int | None) -> Whole:
    with locked(path.with_name(f".{path.stem}.lock")):
        try:
            whole = read_pack(path, stamp)  # another process may have made it meanwhile
        except (FileNotFoundError, DamagedPackError):
            whole = None
        if whole is None:
            parts = source.read(root, size)
            total = len(parts.train.labels) + len(parts.test.labels)
            with tqdm(total=total, desc=f"packing {name}", unit="image", disable=None) as bar:
                write_pack(path, parts, stamp, bar.update)
            whole = read_pack(path, stamp)
    assert whole is not None  # it was written a moment ago with this very stamp
    return whole


def _fetch(name: str, source: Source, root: Path, download: bool, missing: MissingDataError) -> None:
    wanted = source.wanted.format(root=root)
    if not download or source.download is None:
        remedy = ", or pass download=True (`--download`)" if source.download else ""
        raise MissingDataError(f"{name}: {missing}. Put {wanted}{remedy}.") from None
    try:
        source.download(root)
    except (OSError, RuntimeError) as error:
        raise MissingDataError(f"{name}: the download failed ({error}). Put {wanted}.") from error


def _stamp(paths: list[Path]) -> str:
    """Changes when one of `paths` does: their names, sizes and dates."""
    entries = []
    for path in paths:
        stat = path.stat()
        # The size of a folder is an accident of its file system.
        entries.append((path.name, 0 if path.is_dir() else stat.st_size, stat.st_mtime_ns))
    return json.dumps(entries)

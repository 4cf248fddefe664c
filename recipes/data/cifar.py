"""CIFAR-10 and CIFAR-100, from `<root>/cifar-10-batches-py` and `<root>/cifar-100-python`."""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recipes.data.packs import Part, Parts
from recipes.data.sets import DataError, MissingDataError
from recipes.data.sources import Source


class Layout(NamedTuple):
    """What differs between the two."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    published: str  # the class of torchvision.datasets


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
        "CIFAR10",
    ),
    "cifar100": Layout("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names", "CIFAR100"),
}


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _Type:
    """What a pickle says of an array's type; NumPy's own would believe flags that make it follow wild pointers."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: nothing that single bytes have."""


class _Bytes:
    """An array of bytes in a pickle, put together here: of the size that its bytes have, not of the one it claims."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Type, bool, bytes | str]) -> None:
        _, shape, kind, columns_first, data = state
        if kind.code in ("u1", "|u1"):
            array = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.uint8)
            self.array = array.reshape(shape, order="F" if columns_first else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Bytes,
    ("numpy._core.multiarray", "_reconstruct"): _Bytes,
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes in protocol 2
}


class _ArraysOnly(pickle._Unpickler):
    """Makes arrays of bytes, bytes, text, numbers, lists and dictionaries; whatever else it asks for is refused.

    Python's unpickler in Python: the one in C makes tables and buffers of any size that a file of ten bytes claims.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch.pop(pickle.BYTEARRAY8[0])  # the only operation that takes memory before it has read the bytes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no use for")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        """Gives an object its state, where that is one of ours: others would have attributes set."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, target = stack.pop(), stack[-1]
        if not isinstance(target, (_Bytes, _Type)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of byte arrays and lists from a pickle of Python 2 or 3, without running any code of its."""
    content = path.read_bytes()
    try:
        found = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise DataError(f"{path} is damaged or not what its name says: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not what its name says: it holds a {type(found).__name__}, not a dictionary")
    return {key: value.array if isinstance(value, _Bytes) else value for key, value in found.items()}


def _batch(path: Path, layout: Layout, classes: int) -> tuple[np.ndarray, np.ndarray]:
    entry = read_pickle(path)
    images, labels = entry.get("data"), entry.get(layout.labels)
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (3072,)):
        raise DataError(f"{path} has no uint8 'data' of shape [N, 3072]")
    if not (
        isinstance(labels, list)
        and len(labels) == len(images)
        and all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise DataError(f"{path} has no {layout.labels!r}: a list of {len(images)} numbers from 0 to {classes - 1}")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _files(root: Path, layout: Layout) -> list[Path]:
    paths = [root / layout.folder / name for name in (*layout.train, layout.test, layout.meta)]
    for path in paths:
        if not path.is_file():
            raise MissingDataError(f"no {path.name} in {path.parent}")
    return paths


def _read(root: Path, size: int | None, layout: Layout) -> Parts:
    *train, test, meta = _files(root, layout)
    classes = read_pickle(meta).get(layout.names)
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        raise DataError(f"{meta} has no {layout.names!r}: a list of the classes' names")
    batches = [_batch(path, layout, len(classes)) for path in train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Parts(tuple(classes), Part.of(images, labels), Part.of(*_batch(test, layout, len(classes))))


def _download(root: Path, layout: Layout) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    published = getattr(datasets, layout.published)
    download_and_extract_archive(published.url, str(root), filename=published.filename, md5=published.tgz_md5)


def _source(layout: Layout, url: str) -> Source:
    return Source(
        read=functools.partial(_read, layout=layout),
        files=functools.partial(_files, layout=layout),
        wanted=f"{', '.join((*layout.train, layout.test, layout.meta))} (from {url}) in {{root}}/{layout.folder}",
        augment="crop-flip",
        download=functools.partial(_download, layout=layout),
    )


SOURCES = {
    "cifar10": _source(LAYOUTS["cifar10"], "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": _source(LAYOUTS["cifar100"], "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
}

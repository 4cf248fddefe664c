"""Packs: a data set's images as one file of bytes, made on first use and mapped into memory afterwards.

A pack is a safetensors file, so that nothing in it can run code. Its header says what it was made from and the CRC-32
of each tensor; a pack that is damaged, or older than the files it was made from, is made again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from recipes.data.sets import DataError, ImageSet, Whole, moments, stratified_order

FORMAT = "activate-while-pruning pack 1"
# Above this many bytes only the header and the sizes are checked: reading everything would take minutes.
CHECKED_UP_TO = 32 << 30
CHUNK = 1024  # images


@dataclass(frozen=True)
class Part:
    """One part of a data set at its source: labels [N], an image's shape, and images [n, C, H, W] at given places."""

    labels: np.ndarray
    shape: tuple[int, int, int]
    read: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> Part:
        """A part that is in memory: images uint8 [N, C, H, W]."""
        return cls(labels, (images.shape[1], images.shape[2], images.shape[3]), images.__getitem__)


@dataclass(frozen=True)
class Parts:
    """A data set at its source."""

    classes: tuple[str, ...]
    train: Part
    test: Part


class DamagedPackError(DataError):
    """A pack whose bytes are not those that were written."""


def write_pack(path: Path, parts: Parts, source: str, progress: Callable[[int], object] = lambda images: None) -> None:
    """Writes `parts` to `path`, whole or not at all; memory stays at a few thousand images whatever the size."""
    order = stratified_order(parts.train.labels)
    train_labels = parts.train.labels[order].astype("<i8")
    test_labels = parts.test.labels.astype("<i8")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {  # eight-byte numbers first: safetensors wants them aligned
        "train.labels": ("I64", train_labels.shape),
        "test.labels": ("I64", test_labels.shape),
        "train.moments": ("I64", (len(order), parts.train.shape[0], 2)),
        "train.images": ("U8", (len(order), *parts.train.shape)),
        "test.images": ("U8", (len(test_labels), *parts.test.shape)),
    }
    offsets, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * (8 if dtype == "I64" else 1)
        offsets[name] = begin

    def header(checksums: dict[str, int]) -> bytes:
        about = {
            "format": FORMAT,
            "classes": json.dumps(parts.classes),
            "source": source,
            "crc32": json.dumps({name: f"{checksums.get(name, 0):08x}" for name in shapes}),
        }
        entries: dict[str, Any] = {"__metadata__": about}
        for name, (dtype, shape) in shapes.items():
            stop = [*offsets.values(), end][list(shapes).index(name) + 1]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], stop]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def put(file: IO[bytes], name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        file.write(data.data)
        checksums[name] = zlib.crc32(data.data, checksums.get(name, 0))

    checksums: dict[str, int] = {}
    with replaced(path) as file:
        start = file.write(header({}))  # the checksums come later, in as many bytes
        put(file, "train.labels", train_labels)
        put(file, "test.labels", test_labels)
        file.seek(start + offsets["train.images"])
        summed = []
        for name, part, places in (
            ("train.images", parts.train, order),
            ("test.images", parts.test, np.arange(len(test_labels))),
        ):
            for begin in range(0, len(places), CHUNK):
                images = part.read(places[begin : begin + CHUNK])
                put(file, name, images)
                if name == "train.images":
                    summed.append(moments(images))
                progress(len(images))
        file.seek(start + offsets["train.moments"])
        put(file, "train.moments", np.concatenate(summed).astype("<i8"))
        file.seek(0)
        file.write(header(checksums))


def read_pack(path: Path, source: str | None = None) -> Whole | None:
    """What `write_pack` wrote, its images mapped rather than read; None if it was made from another `source`.

    Raises DamagedPackError for anything else than such a file, and FileNotFoundError.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise DamagedPackError(f"{path} is not a pack of this version")
            if source is not None and about["source"] != source:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if path.stat().st_size <= CHECKED_UP_TO:
            checksums = json.loads(about["crc32"])
            for name, tensor in tensors.items():
                if zlib.crc32(tensor.numpy().data) != int(checksums[name], 16):
                    raise DamagedPackError(f"{path} is damaged: the checksum of {name} is not the one written")
        classes = tuple(json.loads(about["classes"]))
        if not classes or not all(isinstance(name, str) for name in classes):
            raise DamagedPackError(f"{path} is damaged: the classes have no names")
        train, test = (ImageSet(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in ("train", "test"))
        for part in (train, test):
            images, labels = part.images, part.labels
            fit = images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.ndim == 4 and labels.ndim == 1
            if not fit or len(images) != len(labels) or images.shape[1:] != train.images.shape[1:]:
                raise DamagedPackError(f"{path} is damaged: images and labels do not belong together")
            if len(part) and not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(classes):
                raise DamagedPackError(f"{path} is damaged: a label is not one of {len(classes)} classes")
        sums = tensors["train.moments"]
        if sums.dtype != torch.int64 or sums.shape != (len(train), train.images.shape[1], 2):
            raise DamagedPackError(f"{path} is damaged: its images' moments are not theirs")
        return Whole(classes, train, sums.numpy(), test)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedPackError):
            raise
        raise DamagedPackError(f"{path} is damaged: {error}") from error


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the block ends well, whole, and leaves nothing when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared folder's pack from the others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time, so that the ranks of one job pack once; a no-op where there is no flock."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)  # a link could lead anywhere
    with os.fdopen(handle, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, and so does the end of the process

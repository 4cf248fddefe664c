"""Files that are whole or not there, checkpoints that can be trusted, folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from recipes.tensors import load_tensors

LIMIT = 1 << 30  # bytes of a file of JSON; the largest there can be, 10,000 rows with hundreds of layers, has a third
KEPT = 2  # checkpoints: the latest, and the one before in case that one is damaged


class FolderError(ValueError):
    """A folder that cannot be used as asked; the message says why and what would be right."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees the old content or the new one, never a part."""
    content = content.encode() if isinstance(content, str) else content
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, f"it cannot be written: {error.strerror}", str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the name too must survive a power cut
    finally:
        os.close(directory)


def make_folder(folder: Path) -> None:
    """Makes it, with those above it; FolderError where a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FolderError(f"{folder} cannot be made: it, or something above it, is a file") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once: it cannot be read without setting it, which other threads would see


def plain(value: Any) -> Any:
    """The value in JSON's types; a number that is not finite, which JSON does not have, becomes None.

    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """One JSON document."""
    write_whole(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines."""
    write_whole(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))


def parse(text: str) -> dict[str, Any]:
    """One JSON object; ValueError for anything else, numbers that are not finite included."""
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text)  # 1e999 is infinite in Python


def _text(path: Path) -> str:
    _refuse_endless(path)
    return path.read_text(encoding="utf-8")


def _refuse_endless(path: Path) -> None:
    """ValueError for what is no plain file of a size that makes sense: a link may lead to a device without end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a file")
    if status.st_size > LIMIT:
        raise ValueError(f"it has {status.st_size:,} bytes, more than any of its kind")


def refuse_links(*folders: Path) -> None:
    """FolderError where one of these is a link: in a stranger's folder it could lead what is written anywhere."""
    for folder in folders:
        if folder.is_symlink():
            raise FolderError(f"{folder} is a link, which is not followed: put a folder in its place")


def sha256(path: Path) -> str:
    """A file of JSON's checksum; ValueError where it cannot be one."""
    _refuse_endless(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; FolderError where it is missing or not that."""
    try:
        return parse(_text(path))
    except FileNotFoundError:
        raise FolderError(f"{path} is missing: {path.parent} is not the folder of an experiment") from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; FolderError where the file is missing or a line is not JSON."""
    rows = []
    try:
        lines = _text(path).splitlines()
    except FileNotFoundError:
        raise FolderError(f"{path} is missing") from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse(line))
        except ValueError as error:
            raise FolderError(f"{path}, line {number}, is damaged: {error}") from None
    return rows


@contextlib.contextmanager
def locked(folder: Path, patience_s: float = 2.0, alone: bool = True) -> Iterator[None]:
    """Holds a folder for this process, which the system gives up with the process, however it ends.

    Args:
        folder: made if it is not there.
        patience_s: how long to wait for another process, which may just be ending.
        alone: whether nobody writes to the folders inside: what killed processes left there is removed too.

    Raises:
        FolderError: another process holds it, whose number is named, or it is no folder.
    """
    make_folder(folder)
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FolderError(f"{path} is a link, and locking would overwrite what it leads to: remove it") from None
        raise
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    owner = file.read().strip() or "unknown"
                    raise FolderError(f"{folder} is in use by another process (pid {owner})") from None
                time.sleep(0.05)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        inside = [path for path in folder.glob("*/.*.part") if alone and not path.parent.is_symlink()]
        for left in [*folder.glob(".*.part"), *inside]:  # by a process that was killed
            left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def state_errors(folder: Path) -> Iterator[None]:
    """Around taking a saved state over: FolderError for whatever a state of another run, or a forged one, raises."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # there are more ways for a state not to fit than there are checks
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FolderError(
            f"the checkpoint in {folder} is whole, but does not fit this run ({reason}): "
            "remove that folder to begin the run anew"
        ) from error


class Checkpoints:
    """The checkpoints of one run: numbered files of which the last two are kept.

    Each is a file of tensors and plain values, which loading cannot make run code, and beside it a small JSON file
    with its checksum, written afterwards: a checkpoint without it was never finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the next checkpoint, then removes the ones that are too old."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 1
        write_whole(self.folder / f"{number:06d}.pt", content)
        digest = {"schema": 1, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        write_json(self.folder / f"{number:06d}.json", digest)
        for old in numbers[: len(numbers) + 1 - KEPT]:
            for suffix in (".json", ".pt"):
                (self.folder / f"{old:06d}{suffix}").unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is good; None where there is none. Damaged ones are told of, and removed."""
        for number in reversed(self._numbers()):
            try:
                return self._read(number)
            except (OSError, ValueError) as error:
                before = "the one before" if number != self._numbers()[0] else "the beginning of this run"
                warnings.warn(
                    f"checkpoint {self.folder / f'{number:06d}.pt'} is damaged ({error}): going back to {before}",
                    stacklevel=2,
                )
                for suffix in (".json", ".pt"):
                    (self.folder / f"{number:06d}{suffix}").unlink(missing_ok=True)
        return None

    def _read(self, number: int) -> dict[str, Any]:
        digest = read_json(self.folder / f"{number:06d}.json")
        path = self.folder / f"{number:06d}.pt"
        if not path.is_file() or path.stat().st_size != digest.get("bytes"):
            raise ValueError("it is not of the size that was written")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest.get("sha256"):
            raise ValueError("its checksum is wrong")
        state = load_tensors(content)
        if not isinstance(state, dict) or not {"model", "loop", "training"} <= set(state):
            raise ValueError("it is not the state of a run")
        return state

"""Files that torch saved, read without running code, and refused where they would unpack to more than they are."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def load_tensors(source: str | os.PathLike[str] | bytes) -> Any:
    """What `torch.save` wrote, as tensors on the CPU and plain values.

    Args:
        source: the file, or its content.

    Raises:
        ValueError: it is damaged, asks for code, or is compressed (torch never compresses: a file of a megabyte could
            unpack to more than the memory holds).

    >>> buffer = io.BytesIO()
    >>> torch.save({"step": 3, "w": torch.zeros(2)}, buffer)
    >>> load_tensors(buffer.getvalue())
    {'step': 3, 'w': tensor([0., 0.])}
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    size = len(source) if isinstance(source, bytes) else file.stat().st_size
    try:
        whole = _unpacked(file)
        if whole > size:
            raise ValueError(f"{size:,} bytes would unpack to {whole:,}, and torch itself never compresses")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Why it cannot be read; torch's own text is long, and says how to run the code that may be inside."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds a {asked[1]}, which is code, and not only tensors: save the model's state_dict() instead"
    return "it is damaged, or torch.save did not write it"


def _unpacked(file: Any) -> int:
    """The bytes of all entries of a zip archive; 0 for other files, whose sizes torch checks as it reads them."""
    if not zipfile.is_zipfile(file):
        entries = []
    else:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return sum(entry.file_size for entry in entries)

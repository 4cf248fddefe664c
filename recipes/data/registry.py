"""Data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from recipes.data.digits import load_digits
from recipes.data.sets import DataError, ImageData


def names() -> list[str]:
    """The data sets that `load` knows."""
    return ["digits"]


def load(
    name: str, root: str | Path | None = None, download: bool = False, val: int | float | None = None
) -> ImageData:
    """The data set `name`, split into train, validation and test.

    >>> data = load("digits")
    >>> len(data.train), len(data.val), len(data.test), tuple(data.train.images.shape)
    (1200, 200, 397, (1200, 1, 8, 8))
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise DataError(f"unknown data set {name!r}: did you mean {', '.join(close)}?")
    return load_digits(200 if val is None else val)

"""Where a data set comes from: the files it is made of, how to get them, how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes.data.packs import Parts


@dataclass(frozen=True)
class Source:
    """A data set below a root folder, in the layout that torchvision reads.

    `files(root)` lists the files (or, for image folders, the folders) it is made of and raises MissingDataError when
    one is missing; `wanted` says which files to put where and where they come from; `download(root)` fetches them.
    `size` is the default side in pixels where images are resized, None where their size is given.
    """

    read: Callable[[Path, int | None], Parts]
    files: Callable[[Path], list[Path]]
    wanted: str
    augment: str
    download: Callable[[Path], None] | None = None
    size: int | None = None

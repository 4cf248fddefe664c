"""Studies: what each activation paper claims, rebuilt and checked."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ap.names import unknown
from recipes.studies import (  # noqa: F401  (studies register themselves)
    activation_search,
    activation_sweep,
    conv_filter,
    decisive,
    dnr,
    gelu,
    helu,
    init,
    means,
    relu_classifier,
    reproducibility,
    swish_depth,
    xor,
)
from recipes.studies.base import Outcome, Study, execute, registered

__all__ = ["Outcome", "Study", "cli", "create", "names", "run"]


def names() -> list[str]:
    """The studies that `run` knows.

    >>> "xor" in names()
    True
    """
    return sorted(registered())


def create(name: str, *, quick: bool = False, **options: Any) -> Study:
    """The study `name` with its options, ready to be executed.

    Raises:
        ValueError: an unknown name (the close ones are listed) or option.
    """
    if name not in registered():
        raise unknown("study", name, names())
    kind = registered()[name]
    known = list(kind.__dataclass_fields__)
    for option in options:
        if option not in known:
            raise unknown(f"option of the study {name}", option, known)
    return kind.quick(**options) if quick else kind(**options)


def run(name: str, *, quick: bool = False, out: str | os.PathLike[str] | None = None, **options: Any) -> Outcome:
    """Runs the study `name` and returns its tables and verdicts; with `out`, writes them there.

    The folder gets `result.json`, `table.md`, `plot.png` and `page.md`, and a journal from which a run that was
    interrupted goes on when it is started again.
    """
    study = create(name, quick=quick, **options)
    flags = "".join(f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in options.items())
    command = f"python -m recipes study {name}{' --quick' if quick else ''}{flags} --out DIR"
    return execute(study, Path(out) if out is not None else None, command)


def cli(args: Sequence[str] | None = None) -> int:
    """`study NAME [--quick] [--out DIR] [options]`: runs a study and prints its tables and verdicts."""
    from recipes.studies.command import main

    return main(list(sys.argv[1:] if args is None else args))

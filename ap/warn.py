"""Warnings that name the line of whoever uses the package."""

from __future__ import annotations

import sys
import warnings

_INSIDE = frozenset({"ap", "pruners", "torch", "contextlib"})


def warn(message: str) -> None:
    """A UserWarning at the line that led here from outside, however many with-blocks, hooks and pruners lie between.

    >>> import types
    >>> script = types.ModuleType("script")
    >>> script.warn = warn
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     exec(compile("warn('careful')", "train.py", "exec"), vars(script))
    >>> caught[0].filename, caught[0].lineno
    ('train.py', 1)
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

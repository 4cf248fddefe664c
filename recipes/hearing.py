"""Who hears Python's warnings: the run in whose thread they are given."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_guard = threading.Lock()
_listeners: dict[int, Callable[[str], Any]] = {}
_outside = contextlib.ExitStack()  # what there is before the first listener, and again after the last


@contextlib.contextmanager
def heard(listener: Callable[[str], Any]) -> Iterator[None]:
    """Inside, each UserWarning of this thread goes to the listener, once, and nothing else is said.

    `warnings.catch_warnings` is of the whole process, and runs may take turns in one.

    >>> with heard(print):
    ...     for _ in range(2):
    ...         warnings.warn("careful", stacklevel=1)
    careful
    """
    said: set[str] = set()

    def once(why: str) -> None:
        if why not in said:
            said.add(why)
            listener(why)

    me = threading.get_ident()
    with _guard:
        if not _listeners:
            _outside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = _tell
        _listeners[me] = once
    try:
        yield
    finally:
        with _guard:
            del _listeners[me]
            if not _listeners:
                _outside.close()


def _tell(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    listener = _listeners.get(threading.get_ident())
    if listener is not None and issubclass(category, UserWarning):
        listener(str(message))

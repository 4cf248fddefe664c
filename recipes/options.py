"""The options of a command, read by tyro from a dataclass; an unknown one is answered with one line and close names."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from ap.names import close_names

T = TypeVar("T")
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]  # how tyro marks what is told by its place


def read(kind: type[T], arguments: list[str], prog: str, **default: Any) -> T:
    """A command's options.

    Args:
        kind: a dataclass, whose fields are the options.
        arguments: what the command line says.
        prog: the command, for --help.
        default: `default=` an instance that has the values of what is not said.

    Raises:
        ValueError: an option or argument too many, one without its value, or a value of another kind.
    """
    known = _options(kind)
    for place, word in enumerate(arguments):
        if not _is_option(word):
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")  # tyro takes both
        if name in ("-h", "--help"):
            continue
        if name not in known:
            raise ValueError(f"unknown option {name}{close_names(name, known)} (all: {prog} --help)")
        following = arguments[place + 1 :]
        end = next((i for i, later in enumerate(following) if _is_option(later)), len(following))
        _check(name, known[name], [value] if equals else following[:end])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, left = tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **default)
    except SystemExit as error:
        if not error.code:
            raise
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{3,}", " ", said.getvalue()).split())  # tyro draws a box
        raise ValueError(text) from None
    if left:
        raise ValueError(f"unexpected argument {left[0]!r} (what there is: {prog} --help)")
    return options


def _is_option(word: str) -> bool:
    """Whether it is the name of an option, and not a negative number, for example."""
    return re.match("--?[a-z]", word) is not None


def _options(kind: type) -> dict[str, Any]:
    """What may be written on the command line, and its type; options without a prefix, as all are here.

    >>> from recipes.cli import Resume
    >>> _options(Resume)
    {'--workers': int | None, '--quiet': <class 'bool'>, '--no-quiet': <class 'bool'>}
    """
    found: dict[str, Any] = {}
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found |= _options(hint)  # type: ignore[arg-type]
        elif _POSITIONAL not in get_args(marked[field.name]):
            found[f"--{name}"] = hint
            if hint is bool or bool in get_args(hint):
                found[f"--no-{name}"] = hint
    return found


def _check(name: str, hint: Any, values: Sequence[str]) -> None:
    """ValueError where tyro would not take an option's values: its own answer has ten lines.

    >>> _check("--epochs", int, ["1.5"])
    Traceback (most recent call last):
    ValueError: --epochs must be a whole number, not '1.5'
    """
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    elif hint is bool:
        return
    elif not values:
        raise ValueError(f"{name} needs a value")
    else:
        values = values[:1]
    kinds = [hint] if get_origin(hint) is Literal else [k for k in get_args(hint) or [hint] if k is not NoneType]
    for value in values:
        if value == "None" and NoneType in get_args(hint):
            continue
        for kind in kinds:
            if get_origin(kind) is Literal:
                choices = get_args(kind)
                if value not in choices:
                    known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                    raise ValueError(f"{name} must be {known}, not {value!r}{close_names(value, choices)}")
            elif kind in (int, float):
                try:
                    kind(value)
                except ValueError:
                    number = "a whole number" if kind is int else "a number"
                    raise ValueError(f"{name} must be {number}, not {value!r}") from None

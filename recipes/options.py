"""The options of a command, read by tyro from a dataclass; an unknown one is answered with one line and close names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar, get_args, get_type_hints

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
        ValueError: an option or argument too many.
    """
    names = _names(kind)
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")  # tyro takes both
        if re.match("--?[a-z]", name) and name not in (*names, "-h", "--help"):
            raise ValueError(f"unknown option {name}{close_names(name, names)} (all: {prog} --help)")
    options, left = tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **default)
    if left:
        raise ValueError(f"unexpected argument {left[0]!r} (what there is: {prog} --help)")
    return options


def _names(kind: type) -> list[str]:
    """What may be written on the command line; options without a prefix, as all are here.

    >>> from recipes.cli import Resume
    >>> _names(Resume)
    ['--workers', '--quiet', '--no-quiet']
    """
    found: list[str] = []
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found += _names(hint)  # type: ignore[arg-type]
        elif _POSITIONAL not in get_args(marked[field.name]):
            found += [f"--{name}", f"--no-{name}"] if hint is bool or bool in get_args(hint) else [f"--{name}"]
    return found

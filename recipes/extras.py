"""What an installation of the plugin alone lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ModuleNotFoundError):
    """A package that only the extra `recipes` installs is missing."""


@contextmanager
def needs_recipes(what: str) -> Iterator[None]:
    """A foreign package that is missing in the imports of the block is named, with the extra that has it.

    Raises:
        MissingExtraError: `what` cannot be imported.

    Example:
        >>> with needs_recipes("recipes.data"):  # doctest: +ELLIPSIS
        ...     raise ModuleNotFoundError(name="tqdm")
        Traceback (most recent call last):
        recipes.extras.MissingExtraError: recipes.data needs tqdm, which the plugin alone does not: pip install '...'
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "ap", "pruners", "recipes"):
            raise
        raise MissingExtraError(
            f"{what} needs {missing}, which the plugin alone does not: pip install 'activate-while-pruning[recipes]'",
            name=missing,
        ) from None

"""`python -m recipes`, and the console command."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; says what to install where only the plugin is."""
    try:
        from recipes import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("ap", "pruners", "recipes"):
            raise
        print(
            f"error: the experiments need {error.name}, which the plugin alone does not: "
            "pip install 'activate-while-pruning[recipes]'",
            file=sys.stderr,
        )
        return 2
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

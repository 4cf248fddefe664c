"""`python -m recipes`, and the console command."""

from __future__ import annotations

import io
import sys

from recipes.extras import MissingExtraError, needs_recipes


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; says what to install where only the plugin is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every locale has a ±, and a table with a ? is worth having
    try:
        with needs_recipes("python -m recipes"):
            from recipes import cli
        return cli.main(arguments)
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # where nothing has to be saved, or a second time
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The command line of the studies: each study's fields are its options."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import recipes.studies as studies
from recipes.options import read
from recipes.studies.base import Study, execute
from recipes.studies.pages import write_docs


def main(args: list[str]) -> int:
    """Runs one study; the exit code is 0 when it was measured, whatever the verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes study", description="Runs a study: NAME --help lists its options.", add_help=False
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(studies.names())}")
    parser.add_argument("--quick", action="store_true", help="less than a minute on two cores")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results; an interrupted run goes on")
    parser.add_argument(
        "--docs",
        type=Path,
        default=None,
        help="also write the page and picture below this folder; without NAME, all pages anew from their numbers",
    )
    known, rest = parser.parse_known_args(args)
    if known.name is None and known.docs is not None and not rest:
        for result in sorted((known.docs / "studies").glob("*.json")):
            print(f"written: {write_docs(result, known.docs)}")
        return 0
    if known.name is None:
        parser.print_help()
        return 0 if {"-h", "--help"} & set(rest) else 2
    try:
        study = studies.create(known.name, quick=known.quick)
        study = parse(type(study), study, rest)
        if known.docs is not None and known.out is None:
            raise ValueError("--docs is written from the results: give --out as well")
        shown = ["study", known.name, *["--quick"] * known.quick, *rest, "--out", "DIR"]
        command = f"python -m recipes {shlex.join(shown)}"
        outcome = execute(study, known.out, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(outcome)
    if known.docs is not None and known.out is not None:
        print(f"\nwritten: {write_docs(known.out / 'result.json', known.docs)}")
    return 0


def parse(kind: type[Study], default: Study, args: list[str]) -> Study:
    """The study with the options in `args` changed."""
    return read(kind, args, f"python -m recipes study {kind.name}", default=default)

"""`python -m ap watch [options] train.py …`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import types
from pathlib import Path

from ap.watch import Watcher, _say, default_folder, is_first_rank


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ap", description="Dead neurons of any training script.")
    commands = parser.add_subparsers(dest="command", required=True)
    watch = commands.add_parser(
        "watch",
        help="run a training script, unchanged, and watch the models that it trains",
        description="Runs a training script, unchanged, finds the models that it trains, and writes their dead-neuron "
        "rates to TensorBoard, with a report for each layer at the end. Under torchrun: torchrun … -m ap watch "
        "train.py …; rank 0 reports its own passes.",
    )
    watch.add_argument("--out", help="folder for events and reports (default: runs/SCRIPT-DATE-TIME)")
    watch.add_argument("--every", type=int, default=50, help="observe every so many passes (default: 50)")
    watch.add_argument("--log-every", type=int, default=200, help="steps between two logs (default: 200)")
    watch.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as in python -m")
    watch.add_argument("script", help="the training script")
    rest = watch.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    rest.required = False  # argparse's error for a missing script would name both
    watch.set_defaults(error=watch.error)  # with the usage of this command
    return parser


def _run(script: str, arguments: list[str], module: bool) -> None:
    """Runs a script as python itself would: its argv, its folder first on the path, its name `__main__`."""
    if module:
        sys.argv[:] = [script, *arguments]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    # Without dont_inherit this file's `annotations` would hold in the script, too.
    exec(compile(Path(script).read_bytes(), script, "exec", dont_inherit=True), main.__dict__)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:  # a package above it is missing, or imports what is
        return not f"{name}.".startswith(f"{error.name}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what the watched script raises is raised."""
    options = _parser().parse_args(arguments)
    if options.module and not _is_module(options.script):
        options.error(f"no such module: {options.script}")
    if not options.module and not os.path.isfile(options.script):
        options.error(f"no such script: {options.script}")
    out = Path(options.out or default_folder(options.script)).absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # said now, and not after hours of training
        options.error(f"{there} is not a folder that can be written: name another with --out")
    try:
        watcher = Watcher(out, options.every, options.log_every)
    except ValueError as error:
        options.error(str(error))
    if not is_first_rank():
        _run(options.script, options.arguments, options.module)
        return
    watcher.start()
    try:
        _run(options.script, options.arguments, options.module)
    finally:
        try:
            watcher.finish()
        except Exception as error:  # the script's own ending counts
            _say(f"no report: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

"""`answer NAME --out DIR`: runs a plan, or what is left of it, and writes its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ap.names import unknown
from recipes import experiment
from recipes.answers import plans
from recipes.answers.evidence import gather
from recipes.answers.pages import page, write
from recipes.experiment import Failed, Stopped
from recipes.storage import FolderError, read_json


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m recipes answer", description="Measured answers: plans, runs, pages.")
    made.add_argument("name", nargs="?", help=f"one of {', '.join(plans.names())}; all if not given")
    made.add_argument("--out", type=Path, default=None, help="where the runs are, a folder an experiment")
    made.add_argument("--docs", type=Path, default=None, help="write pages, numbers and pictures to DOCS/results")
    made.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="run these of the plan's experiments, not all")
    made.add_argument("--workers", type=int, help="how many runs go side by side; default: as for `run`")
    made.add_argument("--report", action="store_true", help="run nothing: only make the page from what there is")
    return made


def main(arguments: Sequence[str]) -> int:
    """Runs plans, and makes their pages; without --out, pages are made anew from the numbers beside them.

    Raises:
        ValueError: an unknown plan or experiment.
    """
    options = parser().parse_args(list(arguments))
    chosen = [plans.get(options.name)] if options.name else list(plans.PLANS.values())
    known = [name for plan in chosen for name in plan.experiments]
    for name in options.only or ():
        if name not in known:
            raise unknown("experiment", name, known)
    if options.out is None and options.docs is None:
        for plan in chosen:
            print(f"{plan.name}: {plan.question}\n  {plan.text}\n  runs: {', '.join(plan.experiments)}\n")
        return 0
    for plan in chosen:
        run = options.out is not None and not options.report
        if run and plan.needs_gpu and options.name is None and not torch.cuda.is_available():
            print(f"{plan.name}: left out, since it needs a GPU; named, it is run in any case", file=sys.stderr)
            continue
        if run and not _run(plan, options.out, options.only, options.workers):
            return 130
        numbers = options.docs and options.docs / "results" / f"{plan.name}.json"
        published = read_json(numbers) if numbers and numbers.exists() else None
        if options.out is not None:
            evidence = gather(plan, options.out, published)
        elif published is not None:
            evidence = published
        else:
            raise FolderError(f"{numbers} is missing: --out RUNS makes it")
        if options.docs is not None:
            print(f"written: {write(plan, evidence, options.docs)}")
        else:
            print(page(plan, evidence))
    return 0


def _run(plan: plans.Plan, out: Path, only: Collection[str] | None = None, workers: int | None = None) -> bool:
    """All experiments of a plan, or only some, one after the other; False where it was stopped."""
    for name, config in plan.experiments.items():
        if only is not None and name not in only:
            continue
        folder = out / name
        threads = experiment.prepare(config, folder)
        print(f"{plan.name}: {name}", file=sys.stderr, flush=True)
        try:
            experiment.execute(config, folder, _say, threads, workers)
        except Stopped:
            print(f"stopped; the same command goes on in {out}", file=sys.stderr)
            return False
        except Failed as error:  # the others are worth having; the page says what is missing
            print(f"error: {error}", file=sys.stderr)
    return True


def _say(event: dict[str, Any]) -> None:
    if event["event"] in ("failed", "warning"):
        print(f"{event['job']}: {event['why']}", file=sys.stderr)

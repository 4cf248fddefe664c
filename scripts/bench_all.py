"""Runs every benchmark, and writes docs/results/benchmarks.json and the page docs/results/benchmarks.md.

    python scripts/bench_all.py [--quick] [--device cpu cuda] [--only pruning masks] [--out DIR]   # on what there is
    python scripts/bench_all.py --device cuda # what was measured on a CPU stays as it is
    python scripts/bench_all.py --page        # only the page again, from benchmarks.json

Each `bench_*.py` beside this file runs in a process of its own, one after the other, on the CPU and, where there is
one, on a CUDA device. Why an aim is missed is written in `bench_reasons.toml`, by aim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from benchmark import SCHEMA, Row

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
INTRODUCTION = """# Benchmarks

`python scripts/bench_all.py` runs all of this and writes this page; each section names the script that can be run by
itself. Candidates are timed in turn, round by round, in one process; a figure is the median over the rounds with the
lowest and the highest, and a ratio is taken within each round, so that a slow minute of the machine meets both sides.
Peak memory is what one call adds to the process's resident memory at its highest point (on CUDA to the allocator's).
"""
BOUNDS = """## Against the bound

What a path cannot avoid is to move its bytes through memory. The bound is the time in which a plain copy moves as many
(read and written, one thread, measured in the same run); the last column says how many times as long the path takes.

"""
AIMS = "## Aims\n\n| aim | limit | measured | |\n| --- | --: | --: | --- |\n"


def benchmarks(only: list[str] | None = None) -> dict[str, Path]:
    """The scripts, by name.

    Raises:
        SystemExit: `only` names one that does not exist.
    """
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    del found["all"]
    odd = [name for name in only or () if name not in found]
    if odd:
        raise SystemExit(f"there is no benchmark {', '.join(odd)}; there are {', '.join(found)}")
    return {name: path for name, path in found.items() if only is None or name in only}


def run(script: Path, device: str, quick: bool) -> Row:
    """One benchmark's results, its seconds and its process's peak memory; `error` where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(script), "--device", device, "--json", str(out)] + ["--quick"] * quick
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=HERE.parent)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it once more
        results = json.loads(out.read_text()) if out.exists() else {}
    if process.returncode:
        results = {"error": f"it ended with exit code {process.returncode}"}
    elif results.get("schema") != SCHEMA:
        results = {"error": f"it wrote no results of schema {SCHEMA}"}
    return {**results, "seconds": time.perf_counter() - start, "process_peak_bytes": usage.ru_maxrss * 1024}


def page(everything: dict[str, Any], reasons: dict[str, str]) -> str:
    """The whole page, as Markdown."""
    runs = [(device, name, result) for device, ran in everything["results"].items() for name, result in ran.items()]
    aims = [(device, aim) for device, _, result in runs for aim in result.get("aims", ())]
    machines = sorted({result["machine"] for *_, result in runs if "machine" in result})
    text = INTRODUCTION + "\n"
    if everything["quick"]:
        text += "**A quick run: it shows that everything works; its figures mean nothing.**\n\n"
    text += "Machine: " + ";\n".join(machines) + f".\nMinutes of the run: {everything['seconds'] / 60:.0f}.\n\n"
    text += AIMS + "".join(map(_aim, aims)) + "\n"
    missed = {aim["key"] for _, aim in aims if aim["met"] is False}
    text += "".join(f"- `{key}`: {reasons.get(key, 'not explained yet.')}\n" for key in sorted(missed)) + "\n" * bool(
        missed
    )
    bounds = [bound for *_, result in runs for bound in result.get("bounds", ())]
    if bounds:
        text += BOUNDS + "| path | bytes it cannot avoid | bound, ms | measured, ms | times the bound |\n"
        text += "| --- | --- | --: | --: | --: |\n" + "".join(map(_bound, bounds)) + "\n"
    several = len(everything["results"]) > 1
    for device, name, result in runs:
        text += f"## {result.get('title', name)}{f' ({device})' if several else ''}\n\n"
        if "error" in result:
            text += f"`scripts/bench_{name}.py` gave nothing: {result['error']}.\n\n"
            continue
        text += f"{result['about']}\n`python scripts/bench_{name}.py --device {device}`\n\n"
        if len(machines) > 1:
            text += f"On: {result['machine']}.\n\n"
        text += "".join(_table(setting, rows) for setting, rows in _by_setting(result["rows"]).items())
        text += f"Peak of the whole process: {result['process_peak_bytes'] / 2**30:.1f} GiB.\n\n"
    return text.rstrip("\n") + "\n"


def _aim(of: tuple[str, Row]) -> str:
    device, aim = of
    unit = aim["unit"] and f" {aim['unit']}"
    limit = f"{'≥' if aim['at_least'] else '≤'} {_number(aim['limit'], 4)}{unit}"
    where = "" if device == "cpu" else f" ({device})"
    if aim["measured"] is None:
        return f"| `{aim['key']}`{where}: {aim['what']} | {limit} | – | not measured here: {aim['needs']} |\n"
    verdict = "met" if aim["met"] else f"**missed** by {_gap(aim)}"
    return f"| `{aim['key']}`{where}: {aim['what']} | {limit} | {_number(aim['measured'], 4)}{unit} | {verdict} |\n"


def _gap(aim: Row) -> str:
    """How far a missed aim is from its limit, of the limit."""
    return f"{abs(aim['measured'] / aim['limit'] - 1):.1%}" if aim["limit"] else _number(abs(aim["measured"]))


def _bound(row: Row) -> str:
    times = f"{1e3 * row['bound_s']:.1f} | {1e3 * row['taken_s']:.1f} | {row['times_bound']:.1f}"
    return f"| {row['path']} | {row['what']} | {times} |\n"


def _by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(row["setting"], []).append(row)
    return settings


def _table(setting: str, rows: list[Row]) -> str:
    unit, reference = rows[0]["unit"], rows[0]["reference"]
    # Rows that are each their own reference, or have none, are not held against each other.
    compared, memory = (
        len(rows) > 1 and all(row["reference"] == reference is not None for row in rows),
        any(row["peak_bytes"] is not None for row in rows),
    )
    extra = list(rows[0].get("extra", {}))
    heads = ["", f"median, {unit.replace('us', 'µs')}", "lowest … highest"]
    heads += [f"ratio to {reference}"] * compared + ["peak, MiB"] * memory + extra
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for row in rows:
        cells = [row["name"], _number(row["median_s"] * UNITS[unit])]
        cells.append(f"{_number(row['min_s'] * UNITS[unit])} … {_number(row['max_s'] * UNITS[unit])}")
        if compared:
            ratio = f"{row['ratio']:.3f} ({row['ratio_min']:.3f} … {row['ratio_max']:.3f})"
            cells.append("1" if row["name"] == reference else ratio)
        if memory:
            cells.append("–" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**20))
        lines.append([*cells, *(str(row["extra"][key]) for key in extra)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    rounds = f"{rows[0]['rounds']} rounds" if rows[0]["rounds"] > 1 else "once"
    return f"{setting} ({rounds}):\n\n{table}\n" if setting else table + "\n"


def _number(value: float, significant: int = 3) -> str:
    """So many significant digits, or all of a large number's."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = f"{value:.{significant}g}"
    return f"{value:.6f}".rstrip("0") if "e" in digits else digits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: whether everything works")
    parser.add_argument("--device", nargs="+", help="default: cpu, and cuda where there is one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of benchmarks.json and benchmarks.md")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    saved = options.out / "benchmarks.json"
    everything: dict[str, Any] = {"schema": SCHEMA, "quick": options.quick, "seconds": 0.0, "results": {}}
    if options.page or ((options.only or options.device) and saved.exists()):  # other results stay as they are
        everything = json.loads(saved.read_text())
    if not options.page:
        devices = options.device or ["cpu"] + ["cuda"] * torch.cuda.is_available()
        for device in devices:
            for name, script in benchmarks(options.only).items():
                print(f"\n=== {name} on {device}", flush=True)
                everything["results"].setdefault(device, {})[name] = run(script, device, options.quick)
                everything["quick"] = options.quick
                results = [result for ran in everything["results"].values() for result in ran.values()]
                everything["seconds"] = sum(result["seconds"] for result in results)
                options.out.mkdir(parents=True, exist_ok=True)
                saved.write_text(json.dumps(everything, indent=1) + "\n")  # what is measured is not lost
    reasons = tomllib.loads((HERE / "bench_reasons.toml").read_text())
    (options.out / "benchmarks.md").write_text(page(everything, reasons), encoding="utf-8")
    print(f"\nwrote {options.out / 'benchmarks.md'}")
    failed = [n for ran in everything["results"].values() for n, result in ran.items() if "error" in result]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

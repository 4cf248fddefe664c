"""Shared by the bench_*.py scripts: their arguments, interleaved rounds, peak memory, and one format of results.

A benchmark is a script `bench_NAME.py` that takes `arguments()` and ends in `save()`. `bench_all.py` runs whatever
there is, and writes the page. The results of one are a JSON object:

    title, about   what the page says above its tables: a heading, and a sentence or two of Markdown
    machine        what it ran on
    rows           one a candidate, see `compare`
    aims           one an aim of the design, see `aim`
    bounds         one a path that is held against the memory traffic it cannot do without, see `bound`
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SCHEMA = 2
Row = dict[str, Any]


def arguments(doc: str | None, rounds: int, quick_rounds: int = 2) -> argparse.ArgumentParser:
    """The arguments that every benchmark has; `parse` reads them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {rounds}, quick {quick_rounds})")
    parser.add_argument("--quick", action="store_true", help="small and short: whether it works, not how fast it is")
    parser.add_argument("--json", metavar="FILE", help="where the results go")
    parser.set_defaults(rounds_full=rounds, rounds_quick=quick_rounds)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, threads and seed set accordingly."""
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = options.rounds_quick if options.quick else options.rounds_full
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def machine(device: str = "cpu") -> str:
    """One line on what this was measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    where = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    if device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name()}, {where}"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def seconds(function: Callable[..., object], device: str = "cpu", repeats: int = 1, *given: object) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function(*given)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes(function: Callable[..., object], device: str = "cpu", *given: object) -> int | None:
    """By how much one call raises the memory in use at its highest point; None where the system does not tell.

    On CUDA the allocator's peak; on Linux the kernel's high-water mark of the resident memory. That is exact to a page,
    but does not see memory that the C library had already and uses again: what is free of it is given back first.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    function(*given)
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def compare(
    candidates: Mapping[str, Callable[..., object]],
    reference: str,
    rounds: int = 7,
    device: str = "cpu",
    repeats: int = 1,
    warmup: int = 1,
    unit: str = "ms",
    setting: str = "",
    memory: bool = False,
    fresh: Callable[[], object] | None = None,
) -> list[Row]:
    """Times every candidate once a round, in turn; prints medians, and ratios to the reference of the same round.

    Args:
        candidates: what to call, by name.
        reference: the candidate that the others are held against.
        rounds, repeats, warmup: how many rounds; calls in a row that are timed as one; calls before the first round.
        unit: of what is printed: "s", "ms" or "us".
        setting: what is measured, e.g. the model and its size; the rows of one setting make one table.
        memory: also measure `peak_bytes` of one more call of each.
        fresh: makes, before each call and outside of its time, what the call is given as its argument.

    Returns:
        a row a candidate: setting, name, reference, rounds, unit; median_s, min_s, max_s; ratio, ratio_min, ratio_max;
        peak_bytes (or None).
    """

    def given() -> tuple[object, ...]:
        return () if fresh is None else (fresh(),)

    for _ in range(warmup):
        for function in candidates.values():
            function(*given())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]  # so that no one always goes second
        for name in order:
            times[name].append(seconds(candidates[name], device, repeats, *given()))
    rows = []
    for name, function in candidates.items():
        ratios = [mine / base for mine, base in zip(times[name], times[reference], strict=True)]
        rows.append(
            {
                "setting": setting,
                "name": name,
                "reference": reference,
                "rounds": rounds,
                "unit": unit,
                "median_s": statistics.median(times[name]),
                "min_s": min(times[name]),
                "max_s": max(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_bytes": peak_bytes(function, device, *given()) if memory else None,
            }
        )
    _print(rows)
    return rows


def _print(rows: list[Row]) -> None:
    unit, reference = rows[0]["unit"], rows[0]["reference"]
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    width = max(len(row["name"]) for row in rows)
    heads = f"{'median':>10}  {'min … max':>22}  {'ratio':>7}  {'min … max':>15}  {'peak, MiB':>10}"
    print(f"\n{rows[0]['setting']}\n{'':{width}}  {heads}   ({unit}; ratio to {reference})")
    for row in rows:
        spread = f"{row['min_s'] * scale:.3f} … {row['max_s'] * scale:.3f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        print(
            f"{row['name']:{width}}  {row['median_s'] * scale:10.3f}  {spread:>22}  "
            f"{row['ratio']:7.3f}  {row['ratio_min']:6.3f} … {row['ratio_max']:6.3f}  {peak:>10}",
            flush=True,
        )


def by_name(rows: list[Row], name: str, setting: str | None = None) -> Row:
    """The row of a candidate."""
    return next(row for row in rows if row["name"] == name and setting in (None, row["setting"]))


def aim(
    key: str,
    what: str,
    measured: float | None,
    limit: float,
    unit: str = "",
    at_least: bool = False,
    needs: str = "it needs a GPU",
) -> Row:
    """One aim of the design, and whether it is met.

    Args:
        key: a short name, e.g. "masks-step"; `bench_reasons.toml` holds the reason under it where the aim is missed.
        what: what is to hold, in words, without the numbers.
        measured, limit: of the same unit; None: not measured in this run.
        unit: "" (a ratio), "%", "MiB", "images/s" …
        at_least: the limit is a lower one.
        needs: why it is not measured.
    """
    met = None if measured is None else bool(measured >= limit if at_least else measured <= limit)
    if measured is not None:
        sign = "≥" if at_least else "≤"
        print(f"aim {key}: {measured:.4g}{unit and ' '}{unit}, {sign} {limit:.4g}: {'met' if met else 'missed'}")
    return {
        "key": key,
        "what": what,
        "measured": measured,
        "limit": limit,
        "unit": unit,
        "at_least": at_least,
        "met": met,
        "needs": needs,
    }


def bandwidth(device: str = "cpu", size: int = 1 << 28) -> float:
    """Bytes a second that a copy of `size` bytes moves, read and written: the best of five."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(5))


def bound(path: str, what: str, traffic: float, taken: float, speed: float) -> Row:
    """A path held against its bound: the time in which a plain copy moves the bytes that the path cannot avoid.

    Args:
        path: what was measured, e.g. "global pruning, 300 M weights".
        what: which bytes these are.
        traffic: how many.
        taken: seconds, measured.
        speed: bytes a second, from `bandwidth()` in the same run.
    """
    row = {
        "path": path,
        "what": what,
        "traffic_bytes": traffic,
        "bound_s": traffic / speed,
        "taken_s": taken,
        "times_bound": taken * speed / traffic,
        "bytes_per_s": speed,
    }
    print(f"{path}: {taken:.4f} s, {row['times_bound']:.2f} × the {row['bound_s']:.4f} s of its {traffic / 1e6:.0f} MB")
    return row


def save(path: str | None, **results: object) -> None:
    """Writes the results as JSON."""
    if path:
        Path(path).write_text(json.dumps({"schema": SCHEMA, **results}, indent=1) + "\n")

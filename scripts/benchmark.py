"""Shared by the bench_*.py scripts: interleaved rounds, ratios to a reference within each round, medians and spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


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


def seconds(function: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def compare(
    candidates: dict[str, Callable[[], object]],
    reference: str,
    rounds: int = 7,
    device: str = "cpu",
    repeats: int = 1,
    warmup: int = 1,
    unit: str = "ms",
) -> list[dict[str, object]]:
    """Times every candidate once a round, in turn; prints medians, and ratios to the reference of the same round.

    Returns:
        a row a candidate: name, median, minimum, maximum (seconds), ratio and its minimum and maximum over the rounds.
    """
    for _ in range(warmup):
        for function in candidates.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]  # so that no one always goes second
        for name in order:
            times[name].append(seconds(candidates[name], device, repeats))
    rows: list[dict[str, object]] = []
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    width = max(len(name) for name in candidates)
    heads = f"{'median':>10}  {'min … max':>22}  {'ratio':>7}  {'min … max':>15}"
    print(f"{'':{width}}  {heads}   ({unit}; ratio to {reference})")
    for name in candidates:
        ratios = [mine / base for mine, base in zip(times[name], times[reference], strict=True)]
        row = {
            "name": name,
            "median_s": statistics.median(times[name]),
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        rows.append(row)
        spread = f"{min(times[name]) * scale:.3f} … {max(times[name]) * scale:.3f}"
        print(
            f"{name:{width}}  {statistics.median(times[name]) * scale:10.3f}  {spread:>22}  "
            f"{statistics.median(ratios):7.3f}  {min(ratios):6.3f} … {max(ratios):6.3f}"
        )
    return rows


def save(path: str | None, **results: object) -> None:
    """Writes the results as JSON, with the machine."""
    if path:
        Path(path).write_text(json.dumps({"schema": 1, **results}, indent=1) + "\n")

"""What counting dead neurons adds to a training step, against no monitor and against a hook with count_nonzero.

python scripts/bench_dnr.py [--model resnet20] [--batch 128] [--rounds 15] [--compile] [--device cuda] [--json FILE]

The default cadence observes one pass in 50; its cost is computed from the two that it is made of, observed and not
observed passes, each measured here, because it is far below the noise of one step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from benchmark import compare, machine, save
from torch import Tensor, nn

import recipes.models
from ap import DNRMonitor


def naive(model: nn.Module) -> None:
    """What one writes first: a hook on every ReLU that counts what is not 0, unit by unit."""
    counts: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        alive = torch.count_nonzero(output.detach(), dim=0)
        counts[module] = counts[module] + alive if module in counts else alive

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(hook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    original = recipes.models.create(options.model).to(options.device).to(memory_format=layout)
    x = torch.randn(options.batch, 3, 32, 32, device=options.device).to(memory_format=layout)
    y = torch.randint(10, (options.batch,), device=options.device)

    def step(change: Callable[[nn.Module], object] | None) -> Callable[[], None]:
        model = copy.deepcopy(original)
        called = torch.compile(model) if options.compile else model
        if change is not None:
            change(called)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.amp):
                loss = nn.functional.cross_entropy(called(x), y)
            loss.backward()
            optimizer.step()

        return run

    candidates = {
        "no monitor": step(None),
        "no monitor, again": step(None),  # the noise
        "DNRMonitor, every pass": step(lambda model: DNRMonitor(model, every=1).attach()),
        "DNRMonitor, not observing": step(lambda model: DNRMonitor(model, every=10**9).attach()),
    }
    if not options.compile:  # a graph compiled for another copy of the model would be used again, without the hook
        candidates["count_nonzero hook, every pass"] = step(naive)
    how = ", ".join(name for name in ("compile", "amp", "channels_last") if getattr(options, name))
    print(f"{options.model}, batch {options.batch}, forward + backward + SGD step, {how or 'eager'}")
    print(machine(options.device))
    rows = compare(
        candidates, "no monitor", options.rounds, options.device, options.repeats, warmup=5 if options.compile else 2
    )
    ratio = {str(row["name"]): float(row["ratio"]) for row in rows}  # type: ignore[arg-type]
    observed, idle = ratio["DNRMonitor, every pass"], ratio["DNRMonitor, not observing"]
    cadence = (observed + 49 * idle) / 50
    print(f"default cadence (1 pass in 50 observed), from these: {100 * (cadence - 1):+.2f} %")
    save(options.json, machine=machine(options.device), options=vars(options), rows=rows, default_cadence=cadence)


if __name__ == "__main__":
    main()

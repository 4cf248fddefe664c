"""What counting dead neurons adds to a training step, against no monitor and against a hook with count_nonzero.

python scripts/bench_dnr.py [--model resnet20] [--batch 128] [--rounds 15] [--device cuda] [--json FILE]

Eager and compiled. The default cadence observes one pass in 50; its cost is computed from what it is made of, because
it is far below the noise of one step: a fiftieth of an observed pass, and what a pass that is not observed takes
longer, measured where that can be seen, on one tiny image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from benchmark import Row, aim, arguments, by_name, compare, machine, parse, save
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
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    options = parse(parser)
    if options.quick:
        options.model, options.batch = "lenet-300-100", 8
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    original = recipes.models.create(options.model).to(options.device).to(memory_format=layout)
    x = torch.randn(options.batch, 3, 32, 32, device=options.device).to(memory_format=layout)
    y = torch.randint(10, (options.batch,), device=options.device)

    def step(change: Callable[[nn.Module], object] | None, compiled: bool) -> Callable[[], None]:
        model = copy.deepcopy(original)
        called = torch.compile(model) if compiled else model
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

    def measure(compiled: bool) -> list[Row]:
        candidates = {
            "no monitor": step(None, compiled),
            "no monitor, again": step(None, compiled),  # the noise
            "DNRMonitor, every pass": step(lambda model: DNRMonitor(model, every=1).attach(), compiled),
            "DNRMonitor, not observing": step(lambda model: DNRMonitor(model, every=10**9).attach(), compiled),
        }
        if not compiled:  # a graph compiled for another copy of the model would be used again, without the hook
            candidates["count_nonzero hook, every pass"] = step(naive, compiled)
        how = ["compiled" if compiled else "eager", *(n for n in ("amp", "channels_last") if getattr(options, n))]
        setting = f"{options.model}, batch {options.batch}, forward + backward + SGD step, {', '.join(how)}"
        warmup = 5 if compiled else 2
        found = compare(
            candidates,
            "no monitor",
            options.rounds,
            options.device,
            options.repeats,
            warmup,
            setting=setting,
            memory=not compiled,
        )
        return found

    def idle() -> list[Row]:
        """Passes that are not observed, of one tiny image."""
        tiny = torch.randn(1, 3, 32, 32, device=options.device)

        def forward(model: nn.Module) -> Callable[[], object]:
            @torch.no_grad()
            def run() -> object:
                return model(tiny)

            return run

        watched = copy.deepcopy(original).eval()
        DNRMonitor(watched, every=10**9).attach()
        candidates = {"no monitor": forward(copy.deepcopy(original).eval()), "not observing": forward(watched)}
        setting = f"{options.model}, forward pass of one image"
        return compare(candidates, "no monitor", options.rounds, options.device, 20, 2, setting=setting)

    eager, passes, compiled = measure(False), idle(), measure(True)
    seen = {rows[0]["setting"]: by_name(rows, "DNRMonitor, every pass")["ratio"] for rows in (eager, compiled)}
    first, second = seen.values()
    longer = by_name(passes, "not observing")["median_s"] - by_name(passes, "no monitor")["median_s"]
    cadence = 1 + (first - 1) / 50 + max(0.0, longer) / by_name(eager, "no monitor")["median_s"]
    what = "a ResNet-20's training step with exact rates"
    save(
        options.json,
        title="Counting dead neurons",
        about="A training step with a monitor, and with the hook one writes first.",
        machine=machine(options.device),
        rows=eager + passes + compiled,
        aims=[
            aim("dnr-eager", f"{what} on every pass, eager, of one without", first, 1.05),
            aim("dnr-compiled", f"{what} on every pass, compiled, of one without", second, 1.01),
            aim("dnr-cadence", f"{what} at the default cadence, eager, of one without", cadence, 1.005),
        ],
    )


if __name__ == "__main__":
    main()

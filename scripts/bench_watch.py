"""What `python -m ap watch` adds to a training step at its default cadence: hooks, observed passes and logs.

python scripts/bench_watch.py [--rounds 5] [--device cuda] [--batch 32] [--json FILE]

A call is 200 steps, so that four observed passes and one log to TensorBoard are in it, as in any 200 steps.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from benchmark import aim, arguments, by_name, compare, machine, parse, save
from torch import Tensor, nn

import recipes.models
from ap.steps import after_every_step
from ap.watch import Watcher

STEPS = 200


def main() -> None:
    parser = arguments(__doc__, rounds=5, quick_rounds=1)
    parser.add_argument("--batch", type=int, default=32)
    options = parse(parser)
    if options.quick:
        options.batch = 2
    side = 8 if options.quick else 16  # a fifth of the time at 32, and no less strict
    rows = []
    small = recipes.models.create("lenet-300-100", in_channels=1, image_size=8)
    resnet = recipes.models.create("resnet20")
    for name, model, shape, rounds in (
        ("LeNet-300-100, 8 × 8 images", small, (options.batch, 1, 8, 8), 6 * options.rounds),  # its calls are short
        (f"ResNet-20, {side} × {side} images", resnet, (options.batch, 3, side, side), options.rounds),
    ):
        x = torch.randn(shape, device=options.device)
        y = torch.randint(10, (options.batch,), device=options.device)
        setting = f"{STEPS} training steps of {name}, batch {options.batch}"
        with tempfile.TemporaryDirectory() as folder:
            candidates = {
                "unwatched": steps(model, x, y),
                "unwatched, again": steps(model, x, y),  # the noise
                "watched": watched(steps(model, x, y), Watcher(folder)),
            }
            these = compare(candidates, "unwatched", rounds, options.device, unit="ms", setting=setting, repeats=1)
        for row in these:
            added = (row["median_s"] - these[0]["median_s"]) / STEPS
            row["extra"] = {"added to a step, µs": f"{1e6 * added:.0f}"}
        rows += these
    heavy = max(row["setting"] for row in rows)
    aims = [
        aim(
            "watch-step",
            "a watched script's training step, default cadence, to the unwatched one's: ResNet-20",
            by_name(rows, "watched", heavy)["ratio"],
            1.02,
        )
    ]
    save(
        options.json,
        title="Watching a training script",
        about=(__doc__ or "").split("\n\n")[0] + " A call is 200 steps: four observed passes, one log.",
        machine=machine(options.device),
        rows=rows,
        aims=aims,
    )


def steps(original: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """200 training steps of a copy of the model."""
    model = copy.deepcopy(original).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def watched(run: Callable[[], None], watcher: Watcher) -> Callable[[], None]:
    """The same, watched; what is watched once stays so, but between calls nobody else's steps are looked at."""

    def look() -> None:
        if not watcher.watched:
            watcher.start()
            run()
            assert watcher._handle is not None
            watcher._handle.remove()
            return
        handle = after_every_step(watcher._after_step)
        run()
        handle.remove()

    return look


if __name__ == "__main__":
    main()

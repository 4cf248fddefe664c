"""Training ResNet-20 on CIFAR-10: this project's engine against the loops one writes, where its time goes, its bound.

python scripts/bench_training.py [--device cuda] [--side-by-side 1 2 4] [--batch 128] [--loader-workers 2] [--json FILE]

A call of a candidate is one epoch, of all images on a GPU and of a few batches on a CPU. All candidates train the
same network, 20 % of its weights alive, with the same precision, augmentation and optimizer. The engine's batches
come in channels_last, which convolutions on a CPU follow; it also counts dead neurons, in one step of 50. The images
are CIFAR-10's where its files are found, else random bytes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from benchmark import Row, aim, arguments, bandwidth, bound, by_name, compare, machine, parse, save, seconds
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ap import DNRMonitor, Masks
from ap.slots import enforce
from recipes import data as data_sets
from recipes import models, presets
from recipes.data import DataError, ImageData, ImageSet
from recipes.engine import Engine, Training
from recipes.turns import Turns

ENGINE, LOOP = "this project's engine", "DataLoader loop"
IN_TURN, PROCESSES = "in turn in one process", "in processes of their own"


def images(limit: int | None) -> tuple[ImageData, str]:
    """CIFAR-10, or bytes in its shape; and which of the two it is."""
    try:
        data, what = data_sets.load("cifar10"), "CIFAR-10"
    except (DataError, OSError) as error:
        print(f"random bytes instead of images: {str(error).splitlines()[0]}")
        count = limit or 50_000
        random = ImageSet(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,)))
        names = tuple(str(i) for i in range(10))
        data = ImageData("random", random, random, random, names, (127.0,) * 3, (64.0,) * 3, "crop-flip")
        what = "random bytes"
    return (data if limit is None else data.with_train_images(limit)), what


def engine_of(options: Any, data: ImageData, **fields: Any) -> Engine:
    """The engine with the preset's settings."""
    preset = presets.get("resnet20-cifar10-fast").experiment
    changed = {"epochs": 10**6, "schedule": "constant", "warmup": "0ep", "lr": 0.01, "batch_size": options.batch}
    return Engine(dataclasses.replace(preset, device=options.device, **(changed | fields)), data, seed=0)


def sparse(engine: Engine) -> tuple[nn.Module, Masks]:
    """The network on the device with 20 % of its weights alive."""
    torch.manual_seed(0)
    model = engine.prepare(models.create("resnet20"))
    masks = Masks(model)
    masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=0.8)
    return model, masks


def engine_epochs(engine: Engine) -> tuple[Callable[[], object], Training]:
    """Makes epochs as experiments do."""
    model, masks = sparse(engine)
    masks.hold()
    monitor = DNRMonitor(engine.called(model)).attach()
    training = engine.training(model, 0, 0, monitor, masks)
    return lambda: training.run_epoch(lambda step: None), training


class Pictures(Dataset):  # type: ignore[type-arg]
    """As torchvision's CIFAR10 gives them: an image of PIL's, transformed, one at a time."""

    def __init__(self, data: ImageData) -> None:
        self.images = data.train.images.permute(0, 2, 3, 1).numpy()
        self.labels = data.train.labels.tolist()
        mean, std = (tuple(value / 255 for value in values) for values in (data.mean, data.std))
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loop_epochs(engine: Engine, data: ImageData, workers: int, kind: str = "plain") -> Callable[[], object]:
    """The loop one writes: plain, with torch.nn.utils.prune, or with the gradients masked on the host."""
    model, masks = sparse(engine)
    if kind == "prune":
        for name in masks:
            prune.custom_from_mask(masks.module(name), "weight", masks[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Pictures(data),
        engine.config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=engine.device.type == "cuda",
        persistent_workers=workers > 0,
    )

    def epoch() -> None:
        model.train()
        for x, y in loader:
            x, y = x.to(engine.device, non_blocking=True), y.to(engine.device, non_blocking=True)
            optimizer.zero_grad()
            with engine.autocast():
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if kind == "host":
                for name in masks:
                    weight = masks.weight(name)
                    assert weight.grad is not None
                    kept = np.where(np.abs(weight.detach().cpu().numpy()) < 1e-6, 0, 1)
                    weight.grad = torch.from_numpy(weight.grad.cpu().numpy() * kept).to(weight.device, weight.dtype)
            optimizer.step()

    return epoch


# --- where the engine's time goes ------------------------------------------------------------------------------------


def parts_of(engine: Engine) -> Iterator[tuple[Tensor, ...]]:
    """What steps are made from, without end."""
    plan, size = engine.train_set.epoch(0, 0), engine.config.batch_size
    while True:
        for start in range(0, len(plan.order) - size + 1, size):
            yield plan.part(start, start + size)


def stages(engine: Engine, steps: int) -> dict[str, list[float]]:
    """Seconds of each stage of the engine's step, made one by one and waited for."""
    model, masks = sparse(engine)
    optimizer, slots, parts = engine.optimizer(model, 0.01), list(masks._slots.values()), parts_of(engine)
    spent: dict[str, list[float]] = {}

    def timed(stage: str, function: Callable[..., Any], *args: Any) -> Any:
        result: list[Any] = []
        spent.setdefault(stage, []).append(seconds(lambda: result.append(function(*args)), engine.device.type))
        return result[0]

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with engine.autocast():
            outputs = model(x)
        return engine.training_loss(outputs.float(), y)

    model.train()
    for number in range(steps + 2):
        if number == 2:  # the first steps warm up
            spent.clear()
        optimizer.zero_grad(set_to_none=True)
        x, y = timed("data", engine.train_set.gather, *next(parts))
        loss = timed("forward", forward, x, y)
        timed("backward", loss.backward)
        timed("optimizer", optimizer.step)
        timed("masks", enforce, slots, optimizer)
    return spent


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each tensor once an operation; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves((args, results)) if isinstance(t, Tensor)
            )
        return results


def traffic(engine: Engine) -> int:
    """Bytes that one step moves if each operation reads its inputs and writes its outputs once."""
    model, masks = sparse(engine)
    model.train()
    training, part = engine.training(model, 0, 0, None, masks), next(parts_of(engine))
    training._make(part, 0.01)
    with Traffic() as counted:
        training._make(part, 0.01)
    return counted.bytes


def top_operations(engine: Engine, steps: int, count: int = 10) -> list[dict[str, Any]]:
    """The operations that take longest themselves, and their share of all."""
    model, _ = sparse(engine)
    model.train()
    training, parts = engine.training(model, 0, 0), parts_of(engine)
    training._make(next(parts), 0.01)
    on_gpu = engine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            training._make(next(parts), 0.01)
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    whole = sum(getattr(event, name) for event in events) or 1.0  # 0 where the profiler may not look at a GPU
    return [
        {"operation": event.key, "share": getattr(event, name) / whole, "calls_a_step": event.count / steps}
        for event in events[:count]
    ]


# --- several at a time ------------------------------------------------------------------------------------------------


def one_of_many(options: Any, limit: int | None, threads: int, barrier: Any, queue: Any) -> None:
    """A process that trains beside others: one epoch to warm up, then all wait for each other, and are measured."""
    torch.set_num_threads(threads)
    data, _ = images(limit)
    epoch, _ = engine_epochs(engine_of(options, data))
    epoch()
    barrier.wait()
    began = time.time()
    for _ in range(options.rounds):
        epoch()
    queue.put((began, time.time()))


def many_in_one(options: Any, limit: int | None, threads: int, barrier: Any, queue: Any) -> None:
    """One process with as many trainings as the barrier has parties, in turn; else the same."""
    torch.set_num_threads(threads)
    data, _ = images(limit)
    turns, ready = Turns(torch.device(options.device)), 0

    def train() -> None:
        nonlocal ready
        _, training = engine_epochs(engine_of(options, data))
        training.run_epoch(lambda step: turns.pass_on())
        ready += 1
        while ready < barrier.parties:
            turns.pass_on()
        began = time.time()
        for _ in range(options.rounds):
            training.run_epoch(lambda step: turns.pass_on())
        queue.put((began, time.time()))

    turns.share(train, barrier.parties)


def side_by_side(options: Any, limit: int | None, count: int, epoch_images: int, in_turn: bool) -> float:
    """Images a second of this many runs together: in turn in one process, as experiments do, or in one process each."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    given = (options, limit, options.threads, barrier, queue)
    targets = [many_in_one] if in_turn else [one_of_many] * count
    processes = [context.Process(target=target, args=given, daemon=True) for target in targets]
    for process in processes:
        process.start()
    times = [queue.get(timeout=1800) for _ in range(count)]
    for process in processes:
        process.join()
    return count * options.rounds * epoch_images / (max(end for _, end in times) - min(start for start, _ in times))


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--loader-workers", type=int, help="of the DataLoader; default: 8 on a GPU, 0 on a CPU")
    parser.add_argument("--side-by-side", type=int, nargs="*", help="default: 1 2 4 8 on a GPU, none on a CPU")
    options = parse(parser)
    on_gpu = options.device.startswith("cuda")
    limit = options.batch * (2 if options.quick else 10) if not on_gpu or options.quick else None
    workers = options.loader_workers if options.loader_workers is not None else 8 if on_gpu else 0
    data, what = images(limit)
    engine = engine_of(options, data)
    eager = engine_of(options, data, step="eager")
    epoch, _ = engine_epochs(engine)
    candidates = {
        ENGINE: epoch,
        LOOP: loop_epochs(engine, data, workers),
        f"{LOOP} with torch.nn.utils.prune": loop_epochs(engine, data, workers, "prune"),
        f"{LOOP} with gradients masked on the host": loop_epochs(engine, data, workers, "host"),
    }
    count = engine.steps_per_epoch * options.batch
    how = f"{'bfloat16' if engine.half else 'float32'}, {'captured' if engine.captured else 'eager'} steps"
    setting = f"One epoch of {count:,} images ({what}), batch {options.batch}; the engine: {how}"
    rows = compare(candidates, LOOP, options.rounds, options.device, unit="s", setting=setting)
    preset = presets.get("resnet20-cifar10-fast").experiment
    run_images = preset.total_epochs(preset.arms[0]) * 45_000
    for row in rows:
        speed = count / row["median_s"]
        row["extra"] = {
            "images/s": f"{speed:,.0f}",
            "hours a run of `resnet20-cifar10-fast`": f"{run_images / speed / 3600:.3g}",
        }
    spent = stages(eager, 3 if options.quick else 20)
    whole = sum(statistics.median(times) for times in spent.values())
    stage_rows: list[Row] = []
    for stage, times in spent.items():
        stage_rows.append(
            {
                "setting": "A step of the engine, its stages one by one and waited for",
                "name": stage,
                "reference": stage,
                "rounds": len(times),
                "unit": "ms",
                "median_s": statistics.median(times),
                "min_s": min(times),
                "max_s": max(times),
                "ratio": 1.0,
                "ratio_min": 1.0,
                "ratio_max": 1.0,
                "peak_bytes": None,
                "extra": {"share of the step": f"{100 * statistics.median(times) / whole:.1f} %"},
            }
        )
        print(f"{stage:10} {1e3 * statistics.median(times):9.3f} ms  {100 * statistics.median(times) / whole:5.1f} %")
    operations = top_operations(engine, 2 if options.quick else 5)
    for operation in operations:
        print(f"{100 * operation['share']:5.1f} %  {operation['calls_a_step']:6.1f} a step  {operation['operation']}")
    step_s = by_name(rows, ENGINE)["median_s"] / engine.steps_per_epoch
    moved, speed = traffic(eager), bandwidth(options.device)
    bytes_of = "what the operations of a step read and write, one by one"
    counts = options.side_by_side if options.side_by_side is not None else [1, 2, 4, 8] if on_gpu else []
    together: dict[str, dict[int, float]] = {}
    for way in (IN_TURN, PROCESSES) if counts else ():
        together[way] = {}
        for number in counts:
            together[way][number] = side_by_side(options, limit, number, count, way == IN_TURN)
            print(f"{number} side by side, {way}: {together[way][number]:,.0f} images/s", flush=True)
    best = max(together[IN_TURN].values()) if on_gpu and counts else None
    ratio = by_name(rows, ENGINE)["ratio"]
    save(
        options.json,
        title="Training",
        about=about(operations, together),
        machine=machine(options.device),
        rows=rows + stage_rows,
        operations=operations,
        side_by_side=together,
        aims=[
            aim("training-loop", "an epoch of the engine, of one of a plain DataLoader loop", ratio, 1.0),
            aim(
                "training-images",
                "images a second, summed over runs side by side",
                best,
                140_000,
                "images/s",
                at_least=True,
            ),
        ],
        bounds=[bound(f"a training step of ResNet-20, batch {options.batch}", bytes_of, moved, step_s, speed)],
    )


def about(operations: list[dict[str, Any]], together: dict[str, dict[int, float]]) -> str:
    """The paragraph above the tables."""
    longest = ", ".join(f"`{row['operation']}` {100 * row['share']:.0f} %" for row in operations[:5])
    text = (
        "A ResNet-20 with 20 % of its weights alive, all with the same precision, augmentation and optimizer; the "
        "engine's batches come in channels_last, the loops' as torchvision makes them. "
        f"The operations that take longest themselves in the engine's steps: {longest}.\n"
    )
    for way, summed in together.items():
        sums = ", ".join(f"{number}: {speed:,.0f}" for number, speed in summed.items())
        text += f"Images a second of so many runs side by side, {way}, together: {sums}.\n"
    return text


if __name__ == "__main__":
    main()

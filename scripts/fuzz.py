"""A coverage-guided fuzzer over everything that is read from outside: configurations, command lines, files.

    pip install atheris
    python scripts/fuzz.py [--targets pickle masks …] [--seconds 60] [--out DIR] [--json FILE]

An input is a finding when it raises anything but an error with a message, makes this process start a program, connect,
or write outside its temporary folder, takes more than 4 GiB, or takes longer than a minute. Inputs that were found are
kept in DIR/<target>, as are the corpora, so that a later run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)  # what the command line turns into one line
Target = Callable[[bytes], object]


class Watch:
    """Notes what no input may cause, by Python's audit events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.on = str(folder), [], False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode = os.fsdecode(arguments[0]), arguments[1]
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and not os.path.abspath(path).startswith((self.folder, "/dev/")):
                self.seen.append(f"writes {path}")
        elif event in ("os.remove", "os.rename", "shutil.rmtree", "os.rmdir") and not os.path.abspath(
            os.fsdecode(arguments[0])  # type: ignore[arg-type]
        ).startswith(self.folder):
            self.seen.append(f"{event} {arguments!r:.200}")


ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    0.5,
    1e308,
    10**30,
    10**400,
    "",
    "a",
    "../../x",
    "none",
    "lite",
    "\n",
    [],
    {},
    [1],
    {"a": 1},
)


def mutated(good: object, data: bytes) -> bytes:
    """JSON: `data` itself where it looks like JSON, else `good` with a few places changed as the bytes say."""
    if data[:1] in (b"{", b"["):
        return data
    return json.dumps(changed(good, data)).encode()


def changed(good: object, data: bytes, odd: Sequence[object] = ODD) -> object:
    """A copy of nested dictionaries and lists in which up to four places are odd, or missing, as the bytes say."""
    result = copy.deepcopy(good)
    for at in range(0, min(len(data), 12) - 2, 3):
        places = _places(result)
        if not places:
            break
        inner, key = places[(data[at] << 8 | data[at + 1]) % len(places)]
        if data[at + 2] == 255 and isinstance(inner, dict):
            del inner[key]
        else:
            inner[key] = copy.deepcopy(odd[data[at + 2] % len(odd)])  # type: ignore[index]
    return result


def _places(value: object) -> list[tuple[object, object]]:
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in items] + [place for _, inner in items for place in _places(inner)]


# --- targets: each makes seeds, and a function of bytes -------------------------------------------------------------


def _net():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def _loop():
    from ap.cycles import Cycles

    def magnitude(model, masks):
        return {name: masks.weight(name).detach().abs() for name in masks}

    return Cycles(_net(), magnitude, cycles=3, amount=0.3, rate=0.1)


def target_pickle(folder: Path) -> tuple[Target, list[bytes]]:
    """The pickles of CIFAR."""
    import numpy as np

    from recipes.data.cifar import LAYOUTS, _batch

    path = folder / "batch"

    def test(data: bytes) -> None:
        path.write_bytes(data)
        images, labels = _batch(path, LAYOUTS["cifar10"], 10)
        assert images.nbytes <= len(data)
        assert len(images) == len(labels)

    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 4]}
    small = {"data": np.zeros((0, 3072), np.uint8), "labels": []}
    return test, [pickle.dumps(b, protocol) for b in (batch, small) for protocol in (0, 2, 4, 5)]


def target_idx(folder: Path) -> tuple[Target, list[bytes]]:
    """MNIST's files, plain and gzipped."""
    import gzip

    from recipes.data.mnist import read_idx

    paths = folder / "images.gz", folder / "images"

    def test(data: bytes) -> None:
        path = paths[data[:2] != b"\x1f\x8b"]
        path.write_bytes(data)
        assert read_idx(path, 3).ndim == 3

    plain = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(24)
    return test, [plain, gzip.compress(plain)]


def target_image(folder: Path) -> tuple[Target, list[bytes]]:
    """The images of a folder."""
    import numpy as np
    from PIL import Image

    from recipes.data.folders import read_image

    path = folder / "image"

    def test(data: bytes) -> None:
        path.write_bytes(data)
        assert read_image(path, 8).shape == (3, 8, 8)

    seeds = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        for mode in ("RGB", "L"):
            buffer = io.BytesIO()
            Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode).save(buffer, kind)
            seeds.append(buffer.getvalue())
    return test, [*seeds, b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"]


def target_folder(folder: Path) -> tuple[Target, list[bytes]]:
    """A folder of images: names of classes and files, and the list of validation images."""
    from recipes.data import folders

    root = folder / "data"
    for name in ("ant", "bee"):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / "images" / "0.png").write_bytes(b"")
    (root / "val" / "images").mkdir(parents=True)

    def test(data: bytes) -> None:
        (root / "val" / "val_annotations.txt").write_bytes(data)
        parts = folders._read(root, 8, "")
        for path, _ in folders._listed(root / "val" / "val_annotations.txt"):
            assert path.resolve().is_relative_to(root / "val"), path
        assert len(parts.test.labels) == len(data.decode().splitlines())

    return test, [b"0.png\tant\t0\t0\n1.png\tbee\n", b"../0.png\tant\n"]


def target_pack(folder: Path) -> tuple[Target, list[bytes]]:
    """Packed data sets."""
    import numpy as np

    from recipes.data.packs import Part, Parts, read_pack, write_pack

    path = folder / "x.safetensors"
    part = Part.of(np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1]))
    write_pack(path, Parts(("a", "b"), part, part), "here")

    good = path.read_bytes()
    body = good[8 + int.from_bytes(good[:8], "little") :]
    header = json.loads(good[8 : -len(body)])

    def test(data: bytes) -> None:
        if data[:1] == b"\1":  # a header with odd things in it, of the size that it claims
            text = mutated(header, data[1:])
            data = len(text).to_bytes(8, "little") + text + body
        path.write_bytes(data)
        whole = read_pack(path)
        if whole is not None:
            whole.split("x", 1, "none")

    return test, [good, b"\1\0\3\7"]


def target_weights(folder: Path) -> tuple[Target, list[bytes]]:
    """Files of weights: safetensors, and what torch saved, by its zip archive or before."""
    import torch
    from safetensors.torch import save

    from recipes.models.weights import load_weights

    paths = folder / "w.safetensors", folder / "w.pt"
    state = _net().state_dict()
    model = _net()

    def test(data: bytes) -> None:
        path = paths[data[8:9] != b"{"]
        path.write_bytes(data)
        load_weights(model, path)

    seeds = [save(state)]
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save(state, buffer, **options)
        seeds.append(buffer.getvalue())
    return test, seeds


def target_checkpoint(folder: Path) -> tuple[Target, list[bytes]]:
    """A checkpoint with a checksum that fits, as a stranger could send it, and what a run makes of it."""
    import torch

    from ap.compaction import fit_
    from recipes import data as data_sets
    from recipes.config import Experiment
    from recipes.engine import Engine
    from recipes.storage import Checkpoints, state_errors

    engine = Engine(Experiment(data="digits", batch_size=100, device="cpu", epochs=1), data_sets.load("digits"), 0)

    def state_of(loop, training) -> dict[str, object]:
        return {"model": loop.model.state_dict(), "loop": loop.state_dict(), "training": training.state_dict()}

    def fresh():
        loop = _loop()
        return loop, engine.training(loop.model, 0, 0)

    def saved(state: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    loop, training = fresh()
    loop.plugin.mark_start()
    loop.model(torch.ones(1, 9)).sum().backward()
    training.optimizer.step()
    good = state_of(loop, training)
    loop.plugin.detach()
    odd = (*ODD, *(torch.zeros(shape) for shape in ((), (0,), (9, 7), (7, 9), (3,))), torch.ones(7, 9) * float("nan"))
    odd = (*odd, torch.empty(7, 9, device="meta"), torch.zeros(8, dtype=torch.uint8), torch.eye(9).to_sparse())

    def test(data: bytes) -> None:
        if data[:1] != b"P":  # no archive: a state in which a few things are changed as the bytes say
            data = saved(changed(good, data, odd))
        (folder / "000001.pt").write_bytes(data)
        digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / "000001.json").write_text(json.dumps(digest))
        state = Checkpoints(folder).latest()
        if state is not None:
            loop, training = fresh()
            try:
                with state_errors(folder):
                    fit_(loop.model, state["model"])
                    loop.load_state_dict(state["loop"])
                    training.load_state_dict(state["training"])
            finally:
                loop.plugin.detach()

    return test, [saved(good), b"\0\3\7"]


def target_masks(folder: Path) -> tuple[Target, list[bytes]]:
    """Mask states in JSON's types and tensors: any structure, no matter how it came from a file."""
    import torch

    from ap import Masks

    masks = Masks(_net())
    state = masks.state_dict()
    listed = {**state, "bits": {name: bits.tolist() for name, bits in state["bits"].items()}}

    def test(data: bytes) -> None:
        found = json.loads(mutated(listed, data))
        if isinstance(found, dict) and isinstance(found.get("bits"), dict):
            for name, bits in found["bits"].items():
                with contextlib.suppress(ValueError, TypeError, RuntimeError, OverflowError):
                    found["bits"][name] = torch.tensor(bits, dtype=torch.uint8)
        masks.load_state_dict(found)

    return test, [json.dumps(listed).encode()]


def target_ranking(folder: Path) -> tuple[Target, list[bytes]]:
    """Scores of any bits, within any scope: what goes is what sorting finds, or the layer with NaN is named."""
    import math

    import numpy as np
    import torch

    from ap import Masks

    def test(data: bytes) -> None:
        head, bits = data[:4].ljust(4, b"\0"), np.frombuffer(data[4:].ljust(336, b"\0")[:336], np.uint8)
        kind = (torch.float32, torch.float16, torch.bfloat16)[head[0] % 3]
        values = torch.from_numpy(bits.copy()).view(kind)
        scores = {"0.weight": values[:63].view(7, 9), "2.weight": values[63:84].view(3, 7)}
        masks = Masks(_net())
        if head[3]:
            masks.prune({name: (score * 7 % 5).nan_to_num() for name, score in scores.items()}, count=head[3] % 84)
        scope = ("global", "layer", "row", "group")[head[1] % 4]
        group = 1 + head[1] // 4 % 9
        before = {name: masks[name].clone() for name in masks}
        count = head[2] % (masks.alive + 1)
        if any(bool((scores[name].isnan() & before[name]).any()) for name in masks):
            try:
                gone = masks.prune(scores, count=count, scope=scope, group=group)
            except ValueError:
                gone = 0
            assert gone in (0, count)
            return
        if scope == "group" and (9 % group or 7 % group):
            return
        assert masks.prune(scores, count=count, scope=scope, group=group) == count
        # Within each set of weights that are compared with each other no kept one is below one that went.
        for part, name in [("global", None)] if scope == "global" else [(scope, name) for name in masks]:
            names = list(masks) if name is None else [name]
            ranks = {n: scores[n].double() for n in names}
            tables = {"global": (1, -1), "layer": (1, -1), "row": (len(ranks[names[0]]), -1), "group": (-1, group)}
            gone, kept = (
                torch.cat([torch.where(chosen(n), ranks[n], fill).flatten() for n in names]).view(tables[part])
                for chosen, fill in (
                    (lambda n: before[n] & ~masks[n], -math.inf),
                    (lambda n: masks[n], math.inf),
                )
            )
            assert bool((gone.amax(1) <= kept.amin(1)).all()), (scope, group, count)

    return test, [bytes([0, 0, 20, 0]) + np.arange(84, dtype=np.float32).tobytes()]


def target_config(folder: Path) -> tuple[Target, list[bytes]]:
    """Saved configurations, and what is computed from them without running anything."""
    from recipes import experiment
    from recipes.config import Experiment

    path = folder / "experiment.json"
    good = {"schema": 1, "threads": 1, "experiment": Experiment(ap=("none", "pro:pruner")).to_dict()}

    def test(data: bytes) -> None:
        path.write_bytes(mutated(good, data))
        config = experiment.load(folder)
        for job in experiment.jobs(config)[:20]:
            assert (folder / job.name).resolve().parent == folder, job.name
            config.total_epochs(job.arm)
        assert Experiment.from_dict(config.to_dict()) == config

    variants = ({}, {"ap": ("none", "lite:random", "pro:pruner"), "schedule": "steps", "milestones": ("2ep", "500it")})
    return test, [json.dumps({**good, "experiment": Experiment(**v).to_dict()}).encode() for v in variants]


def target_experiment(folder: Path) -> tuple[Target, list[bytes]]:
    """The rows of an experiment that somebody else made, compared."""
    from recipes import experiment, report
    from recipes.config import Experiment

    config = Experiment(seeds=2, cycles=1)
    experiment.prepare(config, folder / "out")
    folders = [folder / "out" / job.name for job in experiment.jobs(config)]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    row = {"cycle": 0, "density": 1.0, "alive": 10, "total": 10, "accuracy": 0.5, "dnr_total": 0.1, "shortfall": 0}
    rows = [{**row, "trainings": 0}, {**row, "cycle": 1, "density": 0.8, "alive": 8, "trainings": 1}]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for path in folders[1:]:
        (path / "metrics.jsonl").write_bytes(good)

    def test(data: bytes) -> None:
        lines = data if data[:1] == b"{" else mutated(rows[0], data) + b"\n" + json.dumps(rows[1]).encode() + b"\n"
        (folders[0] / "metrics.jsonl").write_bytes(lines)
        found = report.of_folder(folder / "out")
        str(found), found.to_dict(), found.sentence()

    return test, [good, good[: len(good) // 2]]


def target_cli(folder: Path) -> tuple[Target, list[bytes]]:
    """Command lines, words apart by line ends. Nothing is trained: what would run an experiment only checks it."""
    from recipes import cli, experiment

    def nothing(*_: object, **__: object) -> None:
        raise experiment.Failed("not run")

    experiment.execute = nothing
    cli._cost = nothing
    os.chdir(folder)

    def test(data: bytes) -> None:
        words = data.decode("utf-8", "replace").replace("\0", "").split("\n")
        # A factory is code that the caller names, and a device what is there: neither is input from strangers.
        if len(words) > 40 or any(re.search(r"^\w+(\.\w+)*:\w", word) for word in words) or words[0] == "study":
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                status = cli.main(words)
            except SystemExit as error:
                status = error.code
        assert status in (0, 1, 2) or isinstance(status, str), status
        assert not status or said.getvalue().strip(), "an error without a message"
        assert "Traceback" not in said.getvalue()

    lines = (
        "list",
        "run quickstart --ap none lite pro:pruner --seeds 2 --out x --cycles 3 --amount 0.3",
        "run resnet20-cifar10 --schedule steps --milestones 2ep 500it --rewind 500it --warmup 1ep --dry-run",
        "run quickstart --model mlp --activation helu --pruner lamp --data digits --val 0.2 --optimizer adamw",
        "resume x",
        "compare x y --json",
        "dnr cnn --images 3 --split val --weights w.pt --device cpu",
        "run quickstart --compile --deterministic --threads 2 --precision bfloat16 --where rectified --nesterov",
    )
    return test, ["\n".join(line.split()).encode() for line in lines]


TARGETS = {name.removeprefix("target_"): made for name, made in globals().items() if name.startswith("target_")}


# --- running --------------------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: int, out: Path) -> None:
    """Runs one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["ap", "recipes", "pruners"], enable_loader_override=False):
        for package in ("ap", "pruners", "recipes"):  # all of it: what is imported later would not be instrumented
            for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
                if not module.name.endswith("__main__"):
                    with contextlib.suppress(ImportError):  # an optional dependency that is not there
                        importlib.import_module(module.name)
    import torch

    torch.set_num_threads(1)
    corpus = out / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    warnings.simplefilter("ignore")
    test, seeds = TARGETS[name](folder)
    for seed in [*seeds, b"\0\3\7", bytes(range(12))]:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    test(seeds[0])  # a target that refuses what is good would test nothing but that
    watch = Watch(folder)
    kinds: set[str] = set()

    def one(data: bytes) -> None:
        problem = None
        watch.on = True
        try:
            test(data)
        except EXPECTED as error:
            if not str(error).strip():
                problem = f"{type(error).__name__} without a message"
        except Exception as error:
            import traceback

            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        finally:
            watch.on = False
        if watch.seen:
            problem, watch.seen = watch.seen[0], []
        if problem is not None:
            kind = re.sub(r"\d+", "#", problem)[-60:]
            if kind not in kinds:  # each kind once, and on: one finding must not hide the next
                kinds.add(kind)
                (out / name / f"finding-{hashlib.sha1(data).hexdigest()[:12]}").write_bytes(data)
                print(f"FINDING {name}: {problem}", file=sys.stderr, flush=True)

    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=60", "-max_len=20000"]
    prefix = f"-artifact_prefix={out / name}/"
    atheris.Setup([sys.argv[0], str(corpus), *limits, "-print_final_stats=1", "-verbosity=1", prefix], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.one:
        fuzz(options.one, options.seconds, out)
        return
    rows = []
    for name in options.targets:
        command = [sys.executable, __file__, "--one", name, "--seconds", str(options.seconds), "--out", str(out)]
        run = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace")
        number = re.findall(r"stat::number_of_executed_units:\s+(\d+)", run.stderr)
        found = re.findall(r"^FINDING .*$", run.stderr, re.MULTILINE)
        if run.returncode:
            found.append(f"ended with {run.returncode}: {run.stderr[-500:]}")
        coverage = re.findall(r"cov: (\d+)", run.stderr)
        rows.append(
            {
                "target": name,
                "inputs": int(number[-1]) if number else 0,
                "edges": int(coverage[-1]) if coverage else 0,
                "findings": found,
            }
        )
        print(
            f"{name:12} {rows[-1]['inputs']:10,} inputs  {rows[-1]['edges']:6,} edges", *found, sep="\n  ", flush=True
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["findings"] for row in rows))


if __name__ == "__main__":
    main()

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
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
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
    copy = json.loads(json.dumps(good))
    for at in range(0, min(len(data), 12) - 2, 3):
        places = _places(copy)
        inner, key = places[(data[at] << 8 | data[at + 1]) % len(places)]
        if data[at + 2] == 255 and isinstance(inner, dict):
            del inner[key]
        else:
            inner[key] = json.loads(json.dumps(ODD[data[at + 2] % len(ODD)]))
        if not _places(copy):
            break
    return json.dumps(copy).encode()


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
    part = Part.of(np.zeros((3, 1, 2, 2), np.uint8), np.array([0, 1, 0]))
    write_pack(path, Parts(("a", "b"), part, part), "here")

    def test(data: bytes) -> None:
        path.write_bytes(data)
        whole = read_pack(path)
        if whole is not None:
            whole.split("x", 1, "none")

    return test, [path.read_bytes()]


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
    """A checkpoint with a checksum that fits, as a stranger could send it, and what the loop makes of it."""
    import torch

    from recipes.storage import Checkpoints

    loop = _loop()
    loop.plugin.mark_start()
    buffer = io.BytesIO()
    torch.save({"model": loop.model.state_dict(), "loop": loop.state_dict(), "training": None}, buffer)
    loop.plugin.detach()

    def test(data: bytes) -> None:
        (folder / "000001.pt").write_bytes(data)
        digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / "000001.json").write_text(json.dumps(digest))
        state = Checkpoints(folder).latest()
        if state is not None:
            fresh = _loop()
            with contextlib.suppress(KeyError):
                fresh.load_state_dict(state["loop"])
                fresh.plugin.detach()

    return test, [buffer.getvalue()]


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


def target_config(folder: Path) -> tuple[Target, list[bytes]]:
    """Saved configurations, and what is computed from them without running anything."""
    from recipes import experiment
    from recipes.config import Experiment

    path = folder / "experiment.json"
    good = {"schema": 1, "experiment": Experiment(ap=("none", "pro:pruner")).to_dict()}

    def test(data: bytes) -> None:
        path.write_bytes(mutated(good, data))
        config = experiment.load(folder)
        for job in experiment.jobs(config)[:20]:
            assert (folder / job.name).resolve().parent == folder, job.name
            config.total_epochs(job.arm)
        assert Experiment.from_dict(config.to_dict()) == config

    variants = ({}, {"ap": ("none", "lite:random", "pro:pruner"), "schedule": "steps", "milestones": ("2ep", "500it")})
    return test, [json.dumps({"schema": 1, "experiment": Experiment(**v).to_dict()}).encode() for v in variants]


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
        lines = [mutated(rows[0], data), json.dumps(rows[1]).encode()] if data[:1] != b"{" else [data]
        (folders[0] / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
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
        import ap  # noqa: F401
        import pruners  # noqa: F401
        import recipes.cli
        import recipes.report  # noqa: F401
    import torch

    torch.set_num_threads(1)
    corpus = out / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    warnings.simplefilter("ignore")
    test, seeds = TARGETS[name](folder)
    for seed in [*seeds, b"\0\3\7", bytes(range(12))]:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
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

"""Full disks, folders that cannot be written, damaged metrics: one line, nothing half-written, and the way back."""

import errno
import json
import os
import resource
import signal
import warnings

import pytest
import torch

from recipes import experiment, storage
from recipes.cli import main
from recipes.config import Arm, Experiment
from recipes.storage import Checkpoints, FolderError, read_rows, write_whole

CONFIG = Experiment(
    ap=("lite",), model="lenet-300-100", data="digits", cycles=1, amount=0.36, rate=0.04, epochs=1, batch_size=200,
    seeds=1, monitor_every=0, device="cpu", threads=1,
)  # fmt: skip
JOB = experiment.Job(Arm.parse("lite"), 0)


def run(out):
    experiment.prepare(CONFIG, out)
    experiment.run(CONFIG, out / JOB.name, JOB, experiment.say_nothing, lambda: False)


def without_durations(path):
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in read_rows(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "run"
    run(out)
    return out


@pytest.fixture
def small_files():
    """The system refuses to let any file grow beyond 300 kB, as a full disk or a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def parts(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, small_files):
    checkpoints = Checkpoints(tmp_path)
    small = {"model": {"w": torch.arange(3)}, "loop": {}, "training": None}
    checkpoints.save(small)
    with pytest.raises(OSError, match="File too large"):
        checkpoints.save({**small, "model": {"w": torch.zeros(200_000)}})
    assert torch.equal(checkpoints.latest()["model"]["w"], torch.arange(3))
    assert not parts(tmp_path)
    (tmp_path / "rows").write_text("old")
    with pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "rows", b"x" * 400_000)
    assert (tmp_path / "rows").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_a_run_that_cannot_write_goes_on_later(finished, tmp_path, monkeypatch, code, call):
    """The n-th write to the disk fails; the run then starts again where its last good checkpoint is."""
    original, left = os.fsync, [call]

    def failing(file):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        return original(file)

    monkeypatch.setattr(storage.os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(code)):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert not parts(tmp_path)
    run(tmp_path / "run")
    again, expected = (without_durations(out / JOB.name / "metrics.jsonl") for out in (tmp_path / "run", finished))
    assert again == expected


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", "/proc/run"):  # not even root can make that one
        assert main(["run", "quickstart", "--out", str(out), "--quiet"]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ")
        assert str(out) in said
        assert "\n" not in said


def damage(path, place, content):
    data = bytearray(path.read_bytes())
    data[place] ^= content
    path.write_bytes(data)


def test_damaged_metrics_come_back_from_the_checkpoint(finished, tmp_path):
    path = finished / JOB.name / "metrics.jsonl"
    good = path.read_bytes()
    digit = good.index(b'"accuracy": 0.') + 14
    for place, bits in ((digit, 1), (0, 4), (len(good) - 1, 8)):  # another number, no JSON, another line end
        damage(path, place, bits)
        with pytest.raises(FolderError, match=r"metrics.jsonl is damaged; restore it with: python -m recipes resume"):
            experiment.rows(finished, CONFIG)
        with pytest.warns(UserWarning, match=r"metrics.jsonl is damaged: it is restored from the last checkpoint"):
            assert not experiment.is_done(finished, JOB)
        run(finished)
        assert path.read_bytes() == good
        with warnings.catch_warnings(action="error"):
            assert experiment.is_done(finished, JOB)
    path.write_bytes(good[:-40])  # cut off
    with pytest.warns(UserWarning, match="restored"):
        assert not experiment.is_done(finished, JOB)
    path.unlink()
    with pytest.warns(UserWarning, match="restored"):
        assert not experiment.is_done(finished, JOB)
    run(finished)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[1]", "holds a list"),
        ("{", "damaged"),
        ('{"cycle": 0, "alive": 10, "accuracy": NaN}', "NaN is not a number"),
        ('{"cycle": 1, "alive": 10}', "cycle 1 follows -1"),
        ('{"cycle": 0}', "alive is None"),
        ('{"cycle": 0, "alive": 10, "accuracy": "high"}', "accuracy is 'high'"),
        ('{"cycle": 0, "alive": 10, "dnr_layers": {"relu": 3}}', "two rates a layer"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_metrics_of_strangers(tmp_path, row, expected):
    experiment.prepare(CONFIG, tmp_path)
    (tmp_path / JOB.name).mkdir()
    (tmp_path / JOB.name / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(FolderError, match=expected):
        experiment.rows(tmp_path, CONFIG)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(2):
        checkpoints.save({"model": {"w": torch.full((9,), float(step))}, "loop": {"step": step}, "training": None})
    path = tmp_path / "000002.pt"
    good = path.read_bytes()
    digest = storage.sha256(path)
    for place in range(0, len(good), 97):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        (tmp_path / "000002.json").write_text(json.dumps({"sha256": digest, "bytes": len(good)}))
        with pytest.warns(UserWarning, match=r"000002.pt is damaged .*: going back to the one before"):
            assert checkpoints.latest()["loop"]["step"] == 0

"""Files from strangers: nothing in them runs, and none takes more memory than its size explains."""

import gzip
import io
import pickle
import resource
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from recipes.data import load
from recipes.data.cifar import read_pickle
from recipes.data.mnist import read_idx
from recipes.data.sets import DataError
from recipes.models.weights import read_weights
from recipes.tensors import load_tensors


@pytest.fixture
def memory():
    """At most 2 GiB more address space than now: what takes more fails here instead of on the user's machine."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# An array of objects whose type claims to be plain bytes: NumPy takes the eight letters for an object's address.
POINTER = (
    b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n"
    b"(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'AAAAAAAA'\ntbs."
)


def test_a_pickled_pointer_is_not_followed(tmp_path):
    (tmp_path / "batch").write_bytes(POINTER)
    assert read_pickle(tmp_path / "batch") == {"data": None}
    # The attack is real: NumPy's own classes make an array of a wild object of it, which must not be touched.
    assert pickle.loads(POINTER)["data"].dtype == object


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # object number 2³¹: a table of 32 GiB in Python's own unpickler
        b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",  # a bytearray of 4 GiB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00}.",  # a frame of 1 TiB
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00x.",  # bytes, 1 TiB of them
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # an integer of 2 GiB
        pickle.dumps({"data": np.zeros(9, np.uint8)}, 2).replace(b"K\x09\x85", b"J\xff\xff\xff\x7f\x85"),  # 2³¹ pixels
    ],
)
def test_sizes_that_a_pickle_only_claims(tmp_path, memory, content):
    (tmp_path / "batch").write_bytes(content)
    before = peak()
    try:
        assert read_pickle(tmp_path / "batch") == {}
    except DataError as error:
        assert "batch is damaged" in str(error)  # noqa: PT017 (either answer is right)
    assert peak() - before < 64 << 20


@pytest.mark.parametrize("steps", [b"(S'defaults'\nI1\ndb.", b"(N(S'__doc__'\nI1\ndtb."])
def test_a_pickle_sets_no_attributes(tmp_path, steps):
    for target in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"(l"):
        (tmp_path / "batch").write_bytes(target + steps)
        with pytest.raises(DataError, match="sets the state of"):
            read_pickle(tmp_path / "batch")


def test_labels_that_are_no_numbers_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for labels in ([[1]], [None], [True], [1.0], [10**30], "1", {0: 1}):
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            (folder / name).write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": labels}))
        with pytest.raises(DataError, match="data_batch_1 has no 'labels': a list of 1 numbers from 0 to 9"):
            load("cifar10", root=tmp_path)


def idx(*shape, values=b""):
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (idx(1, 2, 2, values=bytes(1 << 30)), "more than 4 values"),  # a megabyte that unpacks to a gigabyte
        (idx(2**31, 2**31, 4), "more than any"),  # the product is 0 in 64 bits
        (idx(2**32 - 1, 1, 1), "more than any"),
        (idx(3, 2, 2, values=b"1234"), "4 values"),
        (idx(3, 2, 2)[:9], "not an IDX file"),
    ],
)
def test_sizes_that_an_idx_file_only_claims(tmp_path, memory, content, expected):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content
    before = peak()
    with pytest.raises(DataError, match=expected):
        read_idx(path, 3)
    assert peak() - before < 64 << 20


def compressed(path, size):
    """A file of torch, its entries compressed, as torch never does."""
    plain = io.BytesIO()
    torch.save({"w": torch.zeros(size)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


def test_weights_that_unpack_to_more_than_they_are(tmp_path):
    compressed(tmp_path / "bomb.pt", 50_000_000)
    assert (tmp_path / "bomb.pt").stat().st_size < 2 << 20
    before = peak()
    with pytest.raises(ValueError, match=r"bomb.pt cannot be read as weights alone: .*would unpack to 200,000,\d+"):
        read_weights(tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="would unpack"):
        load_tensors((tmp_path / "bomb.pt").read_bytes())
    assert peak() - before < 64 << 20
    assert torch.load(tmp_path / "bomb.pt", weights_only=True)["w"].numel() == 50_000_000  # torch itself unpacks it


def test_a_safetensors_header_that_claims_too_much(tmp_path, memory):
    header = b'{"w":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
    for claimed in (len(header), 2**40, 2**63):
        (tmp_path / "w.safetensors").write_bytes(claimed.to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"w.safetensors cannot be read"):
            read_weights(tmp_path / "w.safetensors")


def test_a_tar_archive_is_not_unpacked(tmp_path, monkeypatch):
    """Before 2016 torch saved tar archives, whose member names can point anywhere."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle", "../outside"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"old.pt cannot be read as weights alone"):
        read_weights("old.pt")
    assert not (tmp_path.parent / "outside").exists()


def test_a_forged_download_is_not_unpacked(tmp_path, monkeypatch):
    """A server that answers with another archive, whose members climb out of the folder."""
    torchvision = pytest.importorskip("torchvision")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../outside"), io.BytesIO())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(DataError, match=r"cifar10: the download failed .*[Cc]orrupted"):
            load("cifar10", root=tmp_path / "a" / "b", download=True)
        server.shutdown()
    assert not list(tmp_path.rglob("outside"))


def test_an_experiment_does_not_bring_its_own_code(tmp_path, monkeypatch, capsys):
    """A stranger's folder holds a model's code, and its settings name it; the user resumes it from inside."""
    from recipes import experiment
    from recipes.cli import main
    from recipes.config import Experiment

    (tmp_path / "brought_along.py").write_text("open('it-ran', 'w')\ndef net(num_classes=10): ...\n")
    config = Experiment(model="brought_along:net", seeds=1, device="cpu")
    experiment.write_json(tmp_path / "experiment.json", {"schema": 1, "threads": 1, "experiment": config.to_dict()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for out in (".", str(tmp_path)):
        assert main(["resume", out, "--quiet"]) == 2
        assert "code in the experiment's own folder" in capsys.readouterr().err
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("arm", ["../../x", "none/../../x", "lite:../x", "", "..", "none:x"])
def test_arms_are_no_paths(tmp_path, arm):
    from recipes import experiment
    from recipes.config import Experiment

    saved = Experiment().to_dict() | {"ap": [arm]}
    experiment.write_json(tmp_path / "experiment.json", {"schema": 1, "experiment": saved})
    with pytest.raises(ValueError, match=r"unknown|criterion"):
        experiment.load(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"seeds": 10**12},
        {"cycles": 10**9},
        {"image_size": 10**6},
        {"first_seed": 2**70},
        {"threads": 10**6},
        {"weight_decay": 10**400},
        {"lr": 10**400},
        {"val": 10**400},
        {"epochs": 10**400},
        {"batch_size": 10**30},
    ],
)
def test_absurd_numbers_are_refused_before_memory_is_taken(setting, memory):
    from recipes.config import Experiment

    with pytest.raises(ValueError, match="or less, not"):
        Experiment(**setting)


def finished_run(out):
    """A folder as `run` leaves it, of one run that has come to its end; small and made by hand."""
    from recipes import experiment
    from recipes.config import Experiment
    from recipes.storage import Checkpoints, sha256, write_json, write_rows

    config = Experiment(
        model="lenet-300-100",
        data="digits",
        ap=("none",),
        pruner="magnitude",
        cycles=0,
        epochs=1,
        seeds=1,
        device="cpu",
    )
    experiment.prepare(config, out)
    run = out / "none-seed0"
    write_json(run / "config.json", {"schema": 1, "arm": "none", "seed": 0, "experiment": config.to_dict()})
    model = experiment.build(config, load("digits"), 0)
    Checkpoints(run / "checkpoints").save({"model": model.state_dict(), "loop": {}, "training": None})
    write_rows(run / "metrics.jsonl", [{"cycle": 0, "alive": 10, "total": 10, "density": 1.0, "accuracy": 0.5}])
    write_json(run / "done.json", {"schema": 1, "rows": 1, "sha256": sha256(run / "metrics.jsonl")})
    return out


def test_the_run_made_by_hand_is_a_good_one(tmp_path):
    from recipes import experiment
    from recipes.cli import main

    out = finished_run(tmp_path / "x")
    assert main(["compare", str(out)]) == main(["resume", str(out), "--quiet"]) == 0
    assert experiment.last_network(out / "none-seed0")[3]["accuracy"] == 0.5


def test_a_link_in_place_of_a_lock_does_not_empty_what_it_leads_to(tmp_path, capsys):
    from recipes.cli import main

    out = finished_run(tmp_path / "x")
    (tmp_path / "precious").write_text("precious")
    (out / ".lock").symlink_to(tmp_path / "precious")
    assert main(["resume", str(out), "--quiet"]) == 2
    assert ".lock is a link" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_in_place_of_a_packs_lock_is_not_followed(tmp_path):
    from recipes.data.packs import locked

    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("linked", ["", "checkpoints", "tensorboard"])
def test_a_run_does_not_write_through_links(tmp_path, linked):
    """Unpacked from a stranger's archive, `none-seed0` leads to the user's own folder."""
    from recipes import experiment, storage

    out = tmp_path / "x"
    config = experiment.load(finished_run(tmp_path / "y"))
    experiment.prepare(config, out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".mine.part").write_text("mine")
    place = out / "none-seed0" / linked if linked else out / "none-seed0"
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(elsewhere, target_is_directory=True)
    job = experiment.jobs(config)[0]
    with storage.locked(out), pytest.raises(storage.FolderError, match=f"{place} is a link, which is not followed"):
        experiment.run(config, out / job.name, job, experiment.say_nothing, lambda: False)
    assert [path.name for path in elsewhere.iterdir()] == [".mine.part"]


@pytest.mark.parametrize("name", ["experiment.json", "none-seed0/metrics.jsonl", "none-seed0/done.json"])
@pytest.mark.parametrize("kind", ["endless", "pipe", "folder", "large"])
def test_files_without_end_are_not_read(tmp_path, memory, capsys, name, kind):
    import os

    from recipes.cli import main

    out = finished_run(tmp_path / "x")
    (out / name).unlink()
    if kind == "endless":
        (out / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(out / name)
    elif kind == "folder":
        (out / name).mkdir()
    else:
        with open(out / name, "wb") as file:
            file.truncate(1 << 40)  # takes no space on the disk
    before = peak()
    assert main(["compare", str(out)]) == 2
    said = capsys.readouterr().err
    assert "is damaged" in said or "is missing" in said
    assert str(out) in said
    assert peak() - before < 64 << 20


def test_a_checkpoint_of_another_size_is_not_read(tmp_path, memory):
    from recipes.storage import Checkpoints

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"model": {}, "loop": {}, "training": None})
    (tmp_path / "000001.pt").unlink()
    (tmp_path / "000001.pt").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match="damaged .it is not of the size that was written"):
        assert checkpoints.latest() is None


def test_numbers_that_no_statistics_can_hold(tmp_path):
    from recipes import experiment
    from recipes.storage import FolderError, parse

    for text in ('{"a": 1e999}', '{"a": -1e999}', '{"a": Infinity}', '{"a": NaN}'):
        with pytest.raises(ValueError, match="is not a number"):
            parse(text)
    out = finished_run(tmp_path / "x")
    path = out / "none-seed0" / "metrics.jsonl"
    for value in (10**400, -(10**30), "1" * 5000):
        (out / "none-seed0" / "done.json").unlink(missing_ok=True)
        path.write_text(f'{{"cycle": 0, "alive": 10, "accuracy": {value}}}\n')
        with pytest.raises(FolderError, match="is damaged"):
            experiment.rows(out, experiment.load(out))


@pytest.mark.parametrize("threads", [10**9, -1, None, "1", 1.5, True])
def test_threads_of_a_strangers_experiment(tmp_path, capsys, threads):
    from recipes import experiment
    from recipes.cli import main
    from recipes.storage import read_json

    out = finished_run(tmp_path / "x")
    saved = read_json(out / "experiment.json")
    experiment.write_json(out / "experiment.json", {**saved, "threads": threads})
    assert main(["resume", str(out), "--quiet"]) == 2
    assert f"experiment.json is damaged: threads is {threads!r}" in capsys.readouterr().err


def test_an_export_does_not_run_code_that_the_experiment_brings(tmp_path, monkeypatch):
    from recipes import experiment
    from recipes.storage import FolderError, read_json

    out = finished_run(tmp_path / "x")
    (out / "brought_too.py").write_text("open('it-ran', 'w')\ndef net(num_classes=10): ...\n")
    saved = read_json(out / "none-seed0" / "config.json")
    saved["experiment"]["model"] = "brought_too:net"
    experiment.write_json(out / "none-seed0" / "config.json", saved)
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    with pytest.raises(FolderError, match="code in the experiment's own folder"):
        experiment.last_network(out / "none-seed0")
    assert not (out / "it-ran").exists()


def test_a_checkpoint_cannot_make_layers_larger(tmp_path, memory):
    """A tensor of one number can claim any shape; layers would be made to fit it."""
    from recipes import experiment
    from recipes.storage import Checkpoints, FolderError

    out = finished_run(tmp_path / "x")
    checkpoints = Checkpoints(out / "none-seed0" / "checkpoints")
    state = checkpoints.latest()
    name = next(name for name in state["model"] if name.endswith("weight"))
    state["model"][name] = torch.zeros(1).expand(2**20, 2**20)
    checkpoints.save(state)
    with pytest.raises(FolderError, match=rf"is whole, but does not fit this run .*another architecture.*{name}"):
        experiment.last_network(out / "none-seed0")


def test_a_pack_with_an_odd_header(tmp_path):
    """Its sizes fit and its checksums are right, but what they belong to is not a data set."""
    import json

    from recipes.data.packs import DamagedPackError, Part, Parts, read_pack, write_pack

    path = tmp_path / "x.safetensors"
    part = Part.of(np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1]))
    write_pack(path, Parts(("a", "b"), part, part), "here")
    assert len(read_pack(path).test) == 4
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    about = header["__metadata__"]
    deep = "[" * 100_000 + "]" * 100_000
    changes = [{"__metadata__": {**about, key: text}} for key in ("classes", "crc32") for text in ("3", "[]", deep, "")]
    changes += [{"__metadata__": {**about, "classes": "[1, 2]"}}, {"__metadata__": {**about, "crc32": "{}"}}]
    changes += [
        {"train.labels": {**header["train.labels"], "dtype": "F64"}},
        {"train.moments": {**header["train.moments"], "shape": [1, 4, 2]}},
        {"test.images": {**header["test.images"], "shape": [4, 4, 1, 1]}},
        {"test.images": {**header["test.images"], "shape": [4, 4]}},
    ]
    for change in changes:
        text = json.dumps({**header, **change}).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        with pytest.raises(DamagedPackError, match=r"x.safetensors"):
            read_pack(path)


def test_a_pipe_among_images_is_passed_over(tmp_path):
    """Opening it would wait for ever."""
    import os

    from PIL import Image

    for place in ("train/ant", "val/ant"):
        (tmp_path / place).mkdir(parents=True)
        os.mkfifo(tmp_path / place / "0.png")
        Image.new("RGB", (8, 8)).save(tmp_path / place / "1.png")
    assert len(load("folder", root=tmp_path, size=8, val=0).train) == 1


def test_an_image_that_unpacks_to_more_than_any_photograph(tmp_path, memory):
    from PIL import Image

    from recipes.data.folders import read_image

    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 1 << 20
    before = peak()
    with pytest.raises(DataError, match=r"bomb.png cannot be read as an image: Image size .* exceeds limit"):
        read_image(path, 8)
    assert peak() - before < 64 << 20

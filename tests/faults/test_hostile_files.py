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
    experiment.write_json(tmp_path / "experiment.json", {"schema": 1, "experiment": config.to_dict()})
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
    "setting", [{"seeds": 10**12}, {"cycles": 10**9}, {"image_size": 10**6}, {"first_seed": 2**70}, {"threads": 10**6}]
)
def test_absurd_numbers_are_refused_before_memory_is_taken(setting, memory):
    from recipes.config import Experiment

    with pytest.raises(ValueError, match="or less, not"):
        Experiment(**setting)

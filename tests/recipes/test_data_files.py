"""Loading from each layout, packing, and what happens to files that are missing, damaged or hostile."""

import contextlib
import gzip
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import recipes.data.packs
from recipes.data import DataError, MissingDataError, load
from recipes.data.cifar import read_pickle
from recipes.data.packs import DamagedPackError, read_pack, replaced

RNG = np.random.default_rng(0)


def write_mnist(root: Path, folder: str = "FashionMNIST", gz: bool = False) -> dict[str, np.ndarray]:
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", 40), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
        data = header + array.tobytes()
        (raw / (name + ".gz" if gz else name)).write_bytes(gzip.compress(data) if gz else data)
    return arrays


def write_cifar10(root: Path) -> tuple[np.ndarray, list[int]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = RNG.integers(0, 256, (60, 3072), dtype=np.uint8), [i % 10 for i in range(60)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(10 * i, 10 * i + 10)
        entry = {
            "batch_label": name.encode(),
            "labels": labels[part],
            "data": images[part],
            "filenames": [b"a.png"] * 10,
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}, protocol=2))
    return images.reshape(-1, 3, 32, 32), labels


def write_cifar100(root: Path) -> np.ndarray:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (300, 3072), dtype=np.uint8)
    fine = [i % 100 for i in range(200)]
    entry = {"fine_labels": fine, "coarse_labels": [0] * 200, "data": images[:200]}
    (folder / "train").write_bytes(pickle.dumps(entry, protocol=2))
    entry = {"fine_labels": fine[:100], "coarse_labels": [0] * 100, "data": images[200:]}
    (folder / "test").write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}, protocol=2))
    return images.reshape(-1, 3, 32, 32)


def write_stl10(root: Path) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (30, 3, 96, 96), dtype=np.uint8)
    labels = (np.arange(30) % 10 + 1).astype(np.uint8)
    for part, places in (("train", slice(20)), ("test", slice(20, 30))):
        images[places].swapaxes(2, 3).tofile(folder / f"{part}_X.bin")
        labels[places].tofile(folder / f"{part}_y.bin")
    return images


COLOURS = {"ant": (250, 10, 10), "bee": (10, 250, 10), "cow": (10, 10, 250)}


def write_folder(root: Path, suffix: str = "png", size: tuple[int, int] = (40, 30)) -> None:
    for part, count in (("train", 10), ("val", 4)):
        for name, colour in COLOURS.items():
            inner = root / part / name
            inner.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", size, colour).save(inner / f"{i}.{suffix}")


def as_rows(images: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_layout(tmp_path: Path, name: str, folder: str, gz: bool) -> None:
    arrays = write_mnist(tmp_path, folder, gz)
    data = load(name, root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 20)
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert data.test.labels.tolist() == (np.arange(20) % 10).tolist()
    both = torch.cat([data.val.images, data.train.images])
    assert as_rows(both) == as_rows(torch.from_numpy(arrays["train-images-idx3-ubyte"]))


def test_mnist_layout_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    write_mnist(tmp_path)
    theirs, ours = FashionMNIST(tmp_path, train=False), load("fashion-mnist", root=tmp_path)
    assert torch.equal(theirs.data, ours.test.images[:, 0])
    assert tuple(theirs.classes) == ours.classes


def test_cifar10_layout_keeps_images_with_their_labels(tmp_path: Path) -> None:
    images, labels = write_cifar10(tmp_path)
    data = load("cifar10", root=tmp_path, val=5)
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 10)
    assert (data.classes[0], data.augment) == ("airplane", "crop-flip")
    assert torch.equal(data.test.images, torch.from_numpy(images[50:]))
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for part in (data.train, data.val, data.test):
        assert [label_of[image.numpy().tobytes()] for image in part.images] == part.labels.tolist()


def test_cifar100_layout(tmp_path: Path) -> None:
    images = write_cifar100(tmp_path)
    data = load("cifar100", root=tmp_path, val=0)
    assert (len(data.train), len(data.test), data.num_classes) == (200, 100, 100)
    assert torch.equal(data.test.images, torch.from_numpy(images[200:]))


def test_stl10_layout_agrees_with_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    images = write_stl10(tmp_path)
    data = load("stl10", root=tmp_path)
    assert torch.equal(data.test.images, torch.from_numpy(images[20:]))
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)  # it compares MD5 sums of the published files
    theirs = STL10(tmp_path, split="test")
    assert torch.equal(torch.from_numpy(theirs.data.copy()), data.test.images)
    assert theirs.labels.tolist() == data.test.labels.tolist()


@pytest.mark.parametrize("suffix", ["png", "JPEG", "webp"])
def test_image_folders(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path, suffix)
    data = load("folder", root=tmp_path, size=16, val=6)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 12)
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.classes == ("ant", "bee", "cow")
    assert torch.bincount(data.val.labels).tolist() == [2, 2, 2]
    colours = torch.tensor(list(COLOURS.values()))
    for part in (data.train, data.val, data.test):
        seen = part.images.float().mean((2, 3))
        assert (seen - colours[part.labels]).abs().max() < 12  # JPEG and WebP are not exact


def test_image_folders_take_the_middle_square(tmp_path: Path) -> None:
    write_folder(tmp_path)
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # only the middle is white
    Image.fromarray(wide).save(tmp_path / "val" / "ant" / "0.png")
    data = load("folder", root=tmp_path, size=20)
    assert (data.test.images[0] == 255).all()


def test_tiny_imagenet_as_published_and_as_plain_folders(tmp_path: Path) -> None:
    plain, published = tmp_path / "plain", tmp_path / "published"
    write_folder(plain / "tiny-imagenet-200", size=(64, 64))
    root = published / "tiny-imagenet-200"
    lines = []
    (root / "val" / "images").mkdir(parents=True)
    for name, colour in COLOURS.items():
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (64, 64), colour).save(root / "train" / name / "images" / f"{i}.png")
        for i in range(4):
            Image.new("RGB", (64, 64), colour).save(root / "val" / "images" / f"{name}_{i}.png")
            lines.append(f"{name}_{i}.png\t{name}\t0\t0\t9\t9")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    first, second = load("tiny-imagenet", root=plain), load("tiny-imagenet", root=published)
    assert first.image_size == second.image_size == 64
    for ours, theirs in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    (root / "val" / "val_annotations.txt").write_text("../../../secret.png\tant\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match=r"line 1.*plain name"):
        load("tiny-imagenet", root=published)


def test_grey_palette_and_transparent_images_become_colour(tmp_path: Path) -> None:
    write_folder(tmp_path, size=(8, 8))
    for i, mode in enumerate(["L", "P", "RGBA", "CMYK"]):
        Image.new("RGB", (8, 8), (9, 9, 9)).convert(mode).save(
            tmp_path / "val" / "ant" / f"{i}.{'tif' if mode == 'CMYK' else 'png'}"
        )
    assert load("folder", root=tmp_path, size=8).test.images.shape[1] == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "train-images-idx3-ubyte.*MNIST/raw.*download=True"),
        ("fashion-mnist", "t10k-labels-idx1-ubyte.*FashionMNIST/raw.*download=True"),
        ("cifar10", "data_batch_1.*test_batch.*batches.meta.*cifar-10-batches-py.*download=True"),
        ("cifar100", "cifar-100-python.*download=True"),
        ("stl10", "train_X.bin.*stl10_binary.*download=True"),
        ("tiny-imagenet", "train/<class>.*tiny-imagenet-200.*download=True"),
        ("imagenet", "train/<class>.*image-net.org.*imagenet"),
        ("folder", "train/<class>/.*val/<class>/"),
    ],
)
def test_missing_files_are_named_in_one_message(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(FileNotFoundError, match=expected) as caught:
        load(name, root=tmp_path)
    assert isinstance(caught.value, MissingDataError)
    assert isinstance(caught.value, ValueError)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing fetched, nothing made


def test_one_missing_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(MissingDataError, match="cifar10: no data_batch_4 in"):
        load("cifar10", root=tmp_path)


def test_a_failed_download_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.utils

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    for function in ("download_url", "download_and_extract_archive"):
        monkeypatch.setattr(torchvision.datasets.utils, function, offline)
    for name in ("mnist", "cifar10", "cifar100", "stl10", "tiny-imagenet"):
        with pytest.raises(MissingDataError, match=rf"{name}: the download failed .*no route to host.* Put "):
            load(name, root=tmp_path, download=True)


def test_a_download_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets.utils

    asked = []

    def fetch(url: str, folder: str, name: str, md5: str) -> None:
        asked.append((name, md5))
        if len(asked) == 1:
            write_mnist(tmp_path, "MNIST", gz=True)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fetch)
    assert len(load("mnist", root=tmp_path, download=True).test) == 20
    assert [len(md5) for _, md5 in asked] == [32] * 4
    load("mnist", root=tmp_path, download=True)
    assert len(asked) == 4  # what is there is not fetched again


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data")
    monkeypatch.delenv("AP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert len(load("fashion-mnist").test) == 20
    write_mnist(tmp_path / "elsewhere", "MNIST")
    monkeypatch.setenv("AP_DATA", str(tmp_path / "elsewhere"))
    assert len(load("mnist").test) == 20


def test_the_pack_is_used_and_remade_when_files_change(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    first = load("fashion-mnist", root=tmp_path)
    pack = tmp_path / "packed" / "fashion-mnist.safetensors"
    written = pack.stat().st_mtime_ns
    again = load("fashion-mnist", root=tmp_path)
    assert pack.stat().st_mtime_ns == written
    assert torch.equal(first.train.images, again.train.images)
    assert first.mean == again.mean
    arrays = write_mnist(tmp_path)  # other pixels
    os.utime(tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte", (1, 1))
    changed = load("fashion-mnist", root=tmp_path)
    assert torch.equal(changed.test.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))


def test_a_new_image_in_a_folder_is_noticed(tmp_path: Path) -> None:
    write_folder(tmp_path, size=(8, 8))
    assert len(load("folder", root=tmp_path, size=8).test) == 12
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "bee" / "new.png")
    assert len(load("folder", root=tmp_path, size=8).test) == 13


def test_a_pack_alone_is_enough(tmp_path: Path) -> None:
    write_mnist(tmp_path / "a")
    before = load("fashion-mnist", root=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "packed").rename(tmp_path / "b" / "packed")
    after = load("fashion-mnist", root=tmp_path / "b")
    assert torch.equal(before.train.images, after.train.images)
    assert after.classes[9] == "Ankle boot"


def test_a_pack_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load("folder", root=tmp_path, size=5, val=0)  # 75 bytes an image: nothing aligned by luck
    tensors = load_file(tmp_path / "packed" / "folder-5.safetensors")
    assert torch.equal(tensors["train.images"], data.train.images)
    assert torch.equal(tensors["test.labels"], data.test.labels)


@pytest.mark.parametrize("place", [-1, -4000, 40, 4, 0])
def test_a_damaged_pack_is_reported_and_made_again(tmp_path: Path, place: int) -> None:
    write_mnist(tmp_path)
    expected = load("fashion-mnist", root=tmp_path)
    pack = tmp_path / "packed" / "fashion-mnist.safetensors"
    data = bytearray(pack.read_bytes())
    data[place] ^= 0x20
    pack.write_bytes(data)
    with pytest.warns(UserWarning, match="made again"):
        found = load("fashion-mnist", root=tmp_path)
    assert torch.equal(found.train.images, expected.train.images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("fashion-mnist", root=tmp_path)


def test_a_truncated_pack_without_its_files_is_an_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    load("fashion-mnist", root=tmp_path)
    pack = tmp_path / "packed" / "fashion-mnist.safetensors"
    pack.write_bytes(pack.read_bytes()[:-100])
    for path in (tmp_path / "FashionMNIST" / "raw").iterdir():
        path.unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(MissingDataError, match="Put train-images-idx3-ubyte"),
    ):
        load("fashion-mnist", root=tmp_path)


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with pytest.raises(TypeError), replaced(target) as file:
        file.write(b"half") + file.write("text")  # type: ignore[arg-type]
    assert list(target.parent.iterdir()) == []
    with replaced(target) as file:
        file.write(b"whole")
    with pytest.raises(TypeError), replaced(target) as file:
        file.write("text")  # type: ignore[arg-type]
    assert target.read_bytes() == b"whole"


def test_a_large_pack_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "one")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    whole = load("cifar10", root=tmp_path / "one", val=0)
    (tmp_path / "one" / "packed" / "cifar10.safetensors").unlink()
    monkeypatch.setattr(recipes.data.packs, "CHUNK", 7)
    pieces = load("cifar10", root=tmp_path / "two", val=0)
    assert torch.equal(whole.train.images, pieces.train.images)
    assert (whole.mean, whole.std) == (pieces.mean, pieces.std)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "packed").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"fashion-mnist: cannot make .*packed.*can be written"):
        load("fashion-mnist", root=tmp_path)


def test_several_processes_pack_once(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    code = f"from recipes.data import load; print(len(load('cifar10', root={str(tmp_path)!r}).train))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["45", "45"]
    assert [path.name for path in (tmp_path / "packed").iterdir() if path.suffix == ".safetensors"] == [
        "cifar10.safetensors"
    ]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hostile-was-here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    for protocol in (0, 2, 5):
        target = tmp_path / "cifar-10-batches-py" / "data_batch_2"
        target.write_bytes(pickle.dumps({"data": Hostile(), "labels": [0]}, protocol=protocol))
        with pytest.raises(DataError, match=r"data_batch_2 .*asks for posix.system"):
            load("cifar10", root=tmp_path)
    assert not (tmp_path / "hostile-was-here").exists()
    pickle.loads(target.read_bytes())  # the attack is real: Python's own reader falls for it
    assert (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2], protocol=2),
        b"c_codecs\nencode\n(S'abc'\nS'rot13'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x.npy'\ntR.",
    ],
)
def test_odd_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(DataError, match="batch is "):
        read_pickle(tmp_path / "batch")


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    # Written as Python 2 and NumPy 1 did: a byte string "data" and a uint8 array [2] of 1 and 255.
    text = (
        b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\n"
        b"Rp7\n(I1\n(I2\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\n"
        b"tp14\nbI00\nS'\\x01\\xff'\np15\ntp16\nbs."
    )
    (tmp_path / "batch").write_bytes(text)
    assert read_pickle(tmp_path / "batch")["data"].tolist() == [1, 255]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"labels": [0]}, "uint8 'data'"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [0]}, "uint8 'data'"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, "a list of 1 numbers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "from 0 to 9"),
    ],
)
def test_odd_batches(tmp_path: Path, entry: dict[str, object], expected: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(entry, protocol=2))
    with pytest.raises(DataError, match=rf"data_batch_3 has .*{expected}"):
        load("cifar10", root=tmp_path)


def test_damaged_source_files_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, gz=True)
    images = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load("fashion-mnist", root=tmp_path)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(DataError, match=r"damaged: .*values, its header says \(40, 28, 28\)"):
        load("fashion-mnist", root=tmp_path)
    images.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="not an IDX file"):
        load("fashion-mnist", root=tmp_path)
    assert not (tmp_path / "packed" / "fashion-mnist.safetensors").exists()

    write_stl10(tmp_path)
    with open(tmp_path / "stl10_binary" / "train_X.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train_X.bin is damaged"):
        load("stl10", root=tmp_path)


def test_odd_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, size=(8, 8))
    bad = tmp_path / "train" / "bee" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    with pytest.raises(DataError, match=r"bee/3.png cannot be read as an image"):
        load("folder", root=tmp_path)
    bad.write_bytes(good)
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(DataError, match=r"no image in .*dog"):
        load("folder", root=tmp_path)
    (tmp_path / "val" / "dog" / "1.png").write_bytes(good)
    with pytest.raises(DataError, match=r"of class 'dog', which .*train does not have"):
        load("folder", root=tmp_path)
    with pytest.raises(DataError, match="size must be at least 1"):
        load("folder", root=tmp_path, size=0)


def test_postscript_in_disguise_is_refused(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript, which runs programs: a file's content decides, not its name."""
    write_folder(tmp_path, size=(8, 8))
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(DataError, match=r"ant/0.png cannot be read"):
        load("folder", root=tmp_path)


def test_packs_of_strangers(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    load("fashion-mnist", root=tmp_path)
    pack = tmp_path / "packed" / "fashion-mnist.safetensors"
    data = pack.read_bytes()
    labels = np.arange(40, dtype="<i8") % 10  # in some order
    whole = read_pack(pack)
    assert whole is not None
    written = whole.train.labels.numpy().astype("<i8").tobytes()
    assert sorted(np.frombuffer(written, "<i8")) == sorted(labels)
    forged = np.full(40, 77, "<i8").tobytes()  # no such class, with a checksum that fits
    old, new = (f"{zlib.crc32(part):08x}".encode() for part in (written, forged))
    pack.write_bytes(data.replace(written, forged).replace(old, new))
    with pytest.raises(DamagedPackError, match="a label is not one of 10 classes"):
        read_pack(pack)
    pack.write_bytes(pickle.dumps({"train.images": Hostile()}))
    with pytest.raises(DamagedPackError, match="damaged"):
        read_pack(pack)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_a_damaged_pickle_is_a_data_error_or_data(place: int, byte: int, cut: bool) -> None:
    whole = pickle.dumps({"data": np.arange(64, dtype=np.uint8).reshape(2, 32), "labels": [3, 4]}, protocol=2)
    place %= len(whole)
    damaged = whole[:place] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch"
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):  # and nothing else
            assert isinstance(read_pickle(path), dict)

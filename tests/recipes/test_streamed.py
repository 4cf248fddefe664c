"""Images read as they are needed: the same bits as images that are kept."""

import dataclasses

import pytest
import torch
from PIL import Image

from recipes import experiment
from recipes.config import Experiment
from recipes.data import ImageData, ImageSet, load
from recipes.engine import Engine
from recipes.resident import Resident
from recipes.streamed import AHEAD, Streamed, fits

CPU = torch.device("cpu")
OPTIONS = [
    {"augment": "none"},
    {"augment": "crop-flip", "cutout": 3},
    {"augment": "resized-crop", "mixup": 0.4},
    {"augment": "crop-flip", "mixup": 1.0, "cutout": 3},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real files, 30 a class: decoded, packed, and mapped from the pack."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("val", 5)):
        for name in ("ant", "bee", "cat"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (9, 12, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return load("folder", root=root, size=8, val=0)


def same(a, b):
    return a[0].stride() == b[0].stride() and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_batches_are_the_same_to_the_bit(data, options):
    kept = Resident(data.train, data, CPU, **options)
    read = Streamed(data.train, data, CPU, **options)
    assert len(kept) == len(read) == 90
    for epoch in (0, 1):
        plans = kept.epoch(7, epoch), read.epoch(7, epoch)
        for start in (0, 16, 32, 48, 64):
            assert same(kept.batch(plans[0], start, start + 16), read.batch(plans[1], start, start + 16))
    plan = read.epoch(7, 2)  # a resumed training begins anywhere
    assert same(kept.batch(kept.epoch(7, 2), 48, 64), read.batch(plan, 48, 64))
    assert same(kept.batch(kept.epoch(7, 2), 0, 16), read.batch(plan, 0, 16))
    for ours, theirs in zip(read.batches(size=40), kept.batches(size=40), strict=True):
        assert same(ours, theirs)
    shares = [list(read.batches(size=20, limit=70, every=2, first=first)) for first in (0, 1)]
    assert [len(labels) for share in shares for _, labels in share] == [20, 20, 20, 10]
    which = torch.tensor([5, 3, 80])
    assert same(kept.plain(which), read.plain(which))


def test_parts_of_a_part_are_its_images(data):
    """As steps that accumulate gradients and processes that share a batch cut it."""
    read = Streamed(data.train, data, CPU, "resized-crop", mixup=0.4)
    plan = read.epoch(0, 0)
    inputs = read.part(plan, 0, 12)
    images, labels = read.gather(*inputs)
    for start in (0, 4, 8):
        few, some = read.gather(*(tensor[..., start : start + 4] for tensor in inputs))
        assert torch.equal(few, images[start : start + 4])
        assert torch.equal(some, labels[start : start + 4])


def test_no_more_is_read_than_is_wanted_next(data):
    read = Streamed(data.train, data, CPU, stride=20)
    plan = read.epoch(0, 0)
    read.batch(plan, 10, 20)  # this process's half of a batch of twenty
    assert sorted(read._read_ahead) == [(30, 40), (50, 60), (70, 80)][: AHEAD - 1]
    read.batch(plan, 70, 80)
    assert sorted(read._read_ahead) == []
    read.batch(read.epoch(0, 1), 10, 20)
    assert len(read._read_ahead) == AHEAD - 1


def test_a_training_ends_with_the_same_weights(data):
    ends = []
    for stream in ("yes", "no"):
        config = Experiment(model="cnn", epochs=2, batch_size=16, lr=0.05, augment="crop-flip", stream=stream)
        engine = Engine(dataclasses.replace(config, device="cpu", mixup=0.2), data, seed=1)
        assert isinstance(engine.train_set, Streamed) == (stream == "yes")
        model = engine.prepare(experiment.build(config, data, 1))
        training = engine.training(model, 0, 0)
        while not training.done:
            training.run_epoch(lambda step: None)
        ends.append((model.state_dict(), engine.evaluate(model, engine.test_set)))
    assert all(torch.equal(ends[0][0][key], ends[1][0][key]) for key in ends[0][0])
    assert ends[0][1] == ends[1][1]


def test_it_streams_by_itself_where_memory_is_short(data, monkeypatch):
    assert fits(data, CPU)
    large = ImageSet(torch.empty(10**9, 3, 8, 8, dtype=torch.uint8, device="meta"), data.train.labels)
    assert not fits(dataclasses.replace(data, train=large), CPU)
    monkeypatch.setattr("recipes.engine.fits", lambda *_: False)
    assert isinstance(Engine(Experiment(batch_size=8, device="cpu"), data, 0).train_set, Streamed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS)
def test_batches_are_the_same_on_a_gpu(data: ImageData, options):
    device = torch.device("cuda")
    kept = Resident(data.train, data, device, **options)
    read = Streamed(data.train, data, device, **options)
    plans = kept.epoch(7, 0), read.epoch(7, 0)
    for start in range(0, 64, 16):
        assert same(kept.batch(plans[0], start, start + 16), read.batch(plans[1], start, start + 16))
    for ours, theirs in zip(read.batches(size=40), kept.batches(size=40), strict=True):
        assert same(ours, theirs)

"""Splits, statistics, and the digits in full."""

import hashlib
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data import DataError, load, names
from recipes.data.sets import ImageSet, Whole, moments, statistics, stratified_order


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.integers(0, 5))
def test_every_beginning_of_the_order_is_stratified(labels: list[int], seed: int) -> None:
    array = np.array(labels)
    order = stratified_order(array, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    share = np.bincount(array, minlength=5) / len(labels)
    for size in range(len(labels) + 1):
        counts = np.bincount(array[order[:size]], minlength=5)
        # Each class alone is within half an image of its share of the deal; the cut between ties adds up to a half
        # for each class that is present.
        assert np.abs(counts - share * size).max() <= 1 + 5 / 2


@pytest.mark.parametrize("size", [10, 50, 100, 500])
def test_equal_classes_get_equal_numbers(size: int) -> None:
    labels = np.repeat(np.arange(10), 100)
    assert np.bincount(labels[stratified_order(labels)[:size]]).tolist() == [size // 10] * 10


def test_order_is_the_same_for_ever() -> None:
    # Worked out once and written down: a changed split would leak validation images into training across versions.
    digest = hashlib.sha256(stratified_order(np.arange(1000) % 7).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "40af96f528cb8d24"


def test_order_has_no_favourite_class() -> None:
    firsts = [
        int(np.repeat(np.arange(4), 10)[stratified_order(np.repeat(np.arange(4), 10), seed)[0]]) for seed in range(60)
    ]
    assert set(firsts) == {0, 1, 2, 3}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 6), st.integers(0, 1000))
def test_statistics_equal_numpy(count: int, channels: int, side: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    mean, std = statistics(moments(images), side * side)
    wide = images.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 2, 3)), rtol=1e-12)
    expected = wide.std((0, 2, 3))
    np.testing.assert_allclose(std, np.where(expected == 0, 1.0, expected), rtol=1e-9)


def test_moments_of_large_white_images_do_not_overflow() -> None:
    images = np.full((1, 1, 512, 512), 255, np.uint8)
    assert moments(images).tolist() == [[[255 * 512**2, 255**2 * 512**2]]]


def test_digits() -> None:
    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1200, 200, 397)
    assert (data.num_classes, data.in_channels, data.image_size, data.augment) == (10, 1, 8, "none")
    every = torch.cat([data.train.images, data.val.images, data.test.images])
    assert every.dtype == torch.uint8
    assert int(every.max()) == 16
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    assert labels.dtype == torch.int64
    # The counts that the data set's own description gives for its 1,797 images.
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len({image.numpy().tobytes() for image in every}) == 1797  # no image twice, so none on two sides
    for part in (data.train, data.val, data.test):
        assert torch.bincount(part.labels).min() >= len(part) // 11


def test_digits_attribution_is_in_the_package() -> None:
    text = files("recipes.data").joinpath("digits.txt").read_text()
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text


def test_digits_look_like_digits() -> None:
    """The nearest neighbour in pixels has the right label nearly always: images and labels belong together."""
    data = load("digits")
    train, test = data.train.images.flatten(1).float(), data.test.images.flatten(1).float()
    nearest = data.train.labels[torch.cdist(test, train).argmin(1)]
    assert (nearest == data.test.labels).float().mean() > 0.96


def test_normalised_training_images_have_zero_mean_and_unit_variance() -> None:
    data = load("digits")
    x = data.normalise(data.train.images)
    assert x.mean().abs() < 1e-4
    assert abs(x.std().item() - 1) < 1e-3
    assert data.normalise(data.val.images, torch.bfloat16).dtype == torch.bfloat16


def test_statistics_come_from_the_training_part_only() -> None:
    images = np.zeros((10, 1, 2, 2), np.uint8)
    images[:5] = 200  # these are held out
    part = ImageSet(torch.from_numpy(images), torch.zeros(10, dtype=torch.int64))
    data = Whole(("a",), part, moments(images), part).split("x", 5, "none")
    assert data.mean == (0.0,)
    assert data.std == (1.0,)  # no variance: 1, so that it can be divided by


def test_validation_sizes() -> None:
    assert len(load("digits", val=0).val) == 0
    assert len(load("digits", val=0).train) == 1400
    assert len(load("digits", val=0.25).val) == 350
    small, large = load("digits", val=50), load("digits", val=200)
    assert torch.equal(small.val.images, large.val.images[:50])
    assert torch.equal(small.test.images, large.test.images)


@pytest.mark.parametrize("val", [-1, 1400, 1.0, -0.1, True, float("nan")])
def test_impossible_validation_sizes(val: float) -> None:
    with pytest.raises(DataError, match=r"digits: val=.*0 to 1399, or a share in \[0, 1\)"):
        load("digits", val=val)


def test_unknown_names_list_the_close_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'cifar-10'; close: cifar10, .*\(known: digits, "):
        load("cifar-10")
    with pytest.raises(ValueError, match="can be shrunk to"):
        load("digits", size=32)
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10", "tiny-imagenet", "imagenet"} <= set(
        names()
    )


@pytest.mark.parametrize("name", ["../digits", "/etc", "a/../../b", "digits/../cifar10", "..", ""])
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(DataError, match="unknown data set"):
        load(name)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: there is no folder .*/photos/train. Put train/<class>/\*"):
        load("folder", tmp_path / "photos")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"folder: no folder of a class in .*/photos/train. Put"):
        load("folder", tmp_path / "photos")


def test_a_data_set_is_printed_in_a_line() -> None:
    data = load("digits", val=0)
    assert repr(data) == (
        "ImageData('digits': 1,400 images of 1 × 8 × 8 to train on, 0 held out, 397 to test, 10 classes)"
    )
    assert repr(data.val) == "ImageSet(no images)"
    assert repr(data.test) == "ImageSet(397 images of 1 × 8 × 8)"


def test_without_the_extra_there_is_one_traceback_that_names_it() -> None:
    code = "import sys; sys.modules['tqdm'] = None; import recipes.data"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert said.count("Traceback") == 1
    assert said.splitlines()[-1].endswith(
        "recipes.data needs tqdm, which the plugin alone does not: pip install 'activate-while-pruning[recipes]'"
    )

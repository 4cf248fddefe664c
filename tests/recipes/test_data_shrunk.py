"""Smaller images: block means, and statistics measured anew."""

import pytest
import torch

from recipes.data import DataError, load


def test_each_pixel_is_the_mean_of_its_block() -> None:
    whole, small = load("digits"), load("digits", size=4)
    for part in ("train", "val", "test"):
        pixels, less = getattr(whole, part).images, getattr(small, part).images
        blocks = pixels.unfold(2, 2, 2).unfold(3, 2, 2).double().mean((-2, -1))
        assert less.dtype == torch.uint8
        assert torch.equal(less, blocks.round().to(torch.uint8))
        assert torch.equal(getattr(whole, part).labels, getattr(small, part).labels)
    normal = small.normalise(small.train.images)
    assert abs(normal.mean().item()) < 1e-4
    assert abs(normal.std().item() - 1) < 1e-3


def test_the_size_must_divide_and_the_own_size_changes_nothing() -> None:
    assert torch.equal(load("digits", size=8).train.images, load("digits").train.images)
    for size in (3, 16, 0):
        with pytest.raises(DataError, match="digits"):
            load("digits", size=size)

"""Crops of random size: their boxes, and pixels against torchvision's."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as V

from recipes.data import ImageData, ImageSet
from recipes.resident import Resident, crop_boxes

SIDE = 16


def resident(**options):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    part = ImageSet(images, torch.arange(6))
    data = ImageData("random", part, part, part, tuple("abcdef"), (120.0, 110.0, 100.0), (60.0, 70.0, 80.0))
    return Resident(part, data, torch.device("cpu"), "resized-crop", **options), data


def boxes(least_area=0.08, count=20_000, seed=0):
    return crop_boxes(count, least_area, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("least_area", [0.08, 0.25, 1.0])
def test_boxes_lie_in_the_image_and_are_of_the_sizes_and_shapes_asked_for(least_area):
    y, x, height, width = boxes(least_area)
    assert (y.abs() + height).max() <= 1 + 1e-6
    assert (x.abs() + width.abs()).max() <= 1 + 1e-6
    area, ratio = height * width.abs(), width.abs() / height
    assert area.min() >= least_area - 1e-5
    assert 3 / 4 - 1e-5 <= ratio.min() <= ratio.max() <= 4 / 3 + 1e-5
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    if least_area == 0.08:
        # Uniform but for the largest, of which those with a ratio that does not fit are drawn again.
        small = area[area < 0.5]
        assert small.mean().item() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
        assert ratio.log().mean().item() == pytest.approx(0, abs=0.01)


def test_where_no_draw_fits_the_whole_image_is_shown():
    _, _, height, width = boxes(1.0)
    whole = (height == 1) & (width.abs() == 1)
    assert whole.float().mean() > 0.99  # an area of 1 fits with a ratio of exactly 1 only


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 16, 16), (3, 5, 8, 10), (6, 0, 5, 4)])
def test_pixels_are_torchvisions(top, left, height, width, mirrored):
    """Inside: at a crop's own border ours sees the image beyond, torchvision's repeats the last pixel."""
    ours, data = resident()
    box = torch.tensor(
        [
            [2 * (top + height / 2) / SIDE - 1],
            [2 * (left + width / 2) / SIDE - 1],
            [height / SIDE],
            [(-1 if mirrored else 1) * width / SIDE],
        ]
    )
    found, _ = ours.gather(torch.tensor([2]), box)
    image = data.normalise(data.train.images[2:3])
    expected = V.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=False)
    expected = expected.flip(-1) if mirrored else expected
    border = math.ceil(SIDE / min(height, width) / 2) if height < SIDE else 0
    inside = slice(border, SIDE - border)
    torch.testing.assert_close(found[..., inside, inside], expected[..., inside, inside], rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_an_epoch_is_augmented_as_the_whole():
    ours, _ = resident(cutout=4)
    plan = ours.epoch(seed=3, epoch=1)
    whole, labels = ours.batch(plan, 0, 6)
    parts = [ours.batch(plan, start, start + 2) for start in (0, 2, 4)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    other, _ = ours.batch(ours.epoch(seed=3, epoch=2), 0, 6)
    assert not torch.equal(other, whole)


def test_held_out_images_are_not_cropped():
    ours, data = resident()
    ((images, _),) = ours.batches()
    torch.testing.assert_close(images, data.normalise(data.train.images))

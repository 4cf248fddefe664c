"""Cut-out and mixup on the device against one image at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes.data import load
from recipes.resident import PADDING, Resident

DATA = load("digits")
CPU = torch.device("cpu")


def one_at_a_time(resident, plan, position):
    """The image at a position of the epoch, before any mixing, by plain slices."""
    image = DATA.train.images[int(plan.order[position])].float()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (DATA.mean, DATA.std))
    size = DATA.image_size
    if plan.offsets is not None:
        top, left, mirrored = (int(v) for v in plan.offsets[:, position])
        image = F.pad(image, (PADDING,) * 4)[:, top : top + size, left : left + size]
        image = image.flip(2) if mirrored else image
    image = (image - mean) / std
    if plan.holes is not None:
        row, column = (int(v) for v in plan.holes[:, position])
        image[:, max(0, row) : max(0, row + resident.cutout), max(0, column) : max(0, column + resident.cutout)] = 0.0
    return image


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("side", [1, 3, 4, 8, 20])
def test_cut_out_blanks_one_square(augment, side):
    resident = Resident(DATA.train, DATA, CPU, augment, cutout=side)
    plan = resident.epoch(seed=2, epoch=3)
    x, y = resident.batch(plan, 40, 100)
    for i in range(60):
        torch.testing.assert_close(x[i], one_at_a_time(resident, plan, 40 + i))
    assert torch.equal(y, DATA.train.labels[plan.order[40:100]])


def test_the_centres_of_cut_outs_are_uniform_over_the_image():
    resident = Resident(DATA.train, DATA, CPU, cutout=3)
    centres = resident.epoch(0, 0).holes + 3 // 2
    for axis in range(2):
        counts = torch.bincount(centres[axis], minlength=DATA.image_size)
        assert len(counts) == DATA.image_size
        expected = len(DATA.train) / DATA.image_size
        assert (counts - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("cutout", [0, 3])
def test_mixup_is_the_weighted_mean_of_two_augmented_images_and_labels(cutout):
    resident = Resident(DATA.train, DATA, CPU, "crop-flip", cutout=cutout, mixup=0.8)
    plan = resident.epoch(seed=1, epoch=0)
    x, y = resident.batch(plan, 0, 50)
    assert x.is_contiguous(memory_format=torch.channels_last)
    logits = torch.randn(50, DATA.num_classes)
    losses = F.cross_entropy(logits, y, reduction="none")
    for i in range(50):
        partner, share = int(plan.partners[i]), float(plan.shares[i])
        first, second = one_at_a_time(resident, plan, i), one_at_a_time(resident, plan, partner)
        torch.testing.assert_close(x[i], (1 - share) * first + share * second)
        labels = DATA.train.labels[plan.order[[i, partner]]]
        one, other = (F.cross_entropy(logits[i], label) for label in labels)  # the loss as the paper's code mixes it
        torch.testing.assert_close(losses[i], (1 - share) * one + share * other)


def test_the_shares_of_mixup_follow_the_beta_distribution():
    from scipy import stats

    for alpha in (0.2, 1.0):
        plan = Resident(DATA.train, DATA, CPU, mixup=alpha).epoch(0, 0)
        assert stats.kstest(plan.shares.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
        assert np.array_equal(np.sort(plan.partners.numpy()), np.arange(len(DATA.train)))


def test_all_of_it_depends_on_seed_and_epoch_only_and_on_no_other_option():
    plain = Resident(DATA.train, DATA, CPU, "crop-flip").epoch(0, 1)
    resident = Resident(DATA.train, DATA, CPU, "crop-flip", cutout=3, mixup=0.4)
    torch.manual_seed(7)
    np.random.seed(7)
    first = resident.epoch(0, 1)
    torch.manual_seed(8)
    np.random.seed(8)
    again, other_epoch, other_seed = resident.epoch(0, 1), resident.epoch(0, 2), resident.epoch(1, 1)
    for name in ("order", "offsets", "holes", "partners", "shares"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other_epoch, name))
        assert not torch.equal(getattr(first, name), getattr(other_seed, name))
    assert torch.equal(first.order, plain.order)
    assert torch.equal(first.offsets, plain.offsets)
    assert torch.equal(first.holes, Resident(DATA.train, DATA, CPU, cutout=3).epoch(0, 1).holes)


def test_parts_of_a_batch_are_the_batch():
    resident = Resident(DATA.train, DATA, CPU, "crop-flip", cutout=4, mixup=1.0)
    plan = resident.epoch(0, 0)
    whole = resident.batch(plan, 20, 60)
    parts = [resident.batch(plan, start, start + 10) for start in range(20, 60, 10)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_held_out_images_are_whole():
    resident = Resident(DATA.test, DATA, CPU, cutout=4, mixup=1.0)
    x = torch.cat([x for x, _ in resident.batches(size=100)])
    torch.testing.assert_close(x, DATA.normalise(DATA.test.images))

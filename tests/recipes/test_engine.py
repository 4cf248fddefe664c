"""The training engine against slow references."""

import io
import math

import pytest
import torch
from torch import nn

from recipes.config import Experiment
from recipes.data import load
from recipes.engine import Engine
from recipes.models import create
from recipes.resident import PADDING, Resident
from recipes.schedule import Schedule


def test_crops_and_mirroring_against_one_image_at_a_time():
    data = load("digits")
    resident = Resident(data.train, data, torch.device("cpu"), "crop-flip")
    plan = resident.epoch(seed=3, epoch=1)
    x, y = resident.batch(plan, 10, 30)
    size = data.image_size
    for i in range(20):
        index = int(plan.order[10 + i])
        top, left, mirrored = (int(v) for v in plan.offsets[:, 10 + i])
        padded = nn.functional.pad(data.train.images[index], (PADDING,) * 4)
        crop = padded[:, top : top + size, left : left + size]
        crop = crop.flip(2) if mirrored else crop
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
        torch.testing.assert_close(x[i], (crop.float() - mean) / std)
        assert y[i] == data.train.labels[index]
    offsets = plan.offsets[:2]
    assert (int(offsets.min()), int(offsets.max())) == (0, 2 * PADDING)
    assert 0.4 < plan.offsets[2].float().mean() < 0.6


def test_an_epochs_plan_depends_on_seed_and_epoch_only():
    data = load("digits")
    resident = Resident(data.train, data, torch.device("cpu"))
    torch.manual_seed(1)
    first = resident.epoch(0, 0).order
    torch.manual_seed(2)
    assert torch.equal(resident.epoch(0, 0).order, first)
    assert not torch.equal(resident.epoch(0, 1).order, first)
    assert not torch.equal(resident.epoch(1, 0).order, first)
    assert torch.equal(first.sort().values, torch.arange(len(data.train)))


def test_test_images_are_never_augmented():
    data = load("digits")
    engine = Engine(Experiment(augment="crop-flip"), data, 0)
    x = torch.cat([x for x, _ in engine.test_set.batches(size=100)])
    torch.testing.assert_close(x, data.normalise(data.test.images))


def trained(config, save_at=None):
    data = load("digits")
    engine = Engine(config, data, 0)
    torch.manual_seed(0)
    model = nn.Sequential(create("cnn", in_channels=1, image_size=8), nn.Dropout(0.1))
    training = engine.training(model, 0, 0)

    def after_step(step):
        if step == save_at:
            torch.save(training.state_dict(), buffer)
            raise StopIteration

    buffer = io.BytesIO()
    try:
        while not training.done:
            training.run_epoch(after_step)
    except StopIteration:
        buffer.seek(0)
        torch.manual_seed(99)
        fresh = nn.Sequential(create("cnn", in_channels=1, image_size=8), nn.Dropout(0.1))
        training = engine.training(fresh, 0, 0)
        training.load_state_dict(torch.load(buffer, weights_only=True))
        while not training.done:
            training.run_epoch(lambda step: None)
    return training


@pytest.mark.parametrize("save_at", [1, 24, 31])
def test_a_training_that_is_saved_goes_on_to_the_same_bits(save_at):
    config = Experiment(epochs=2, batch_size=50, lr=0.05, schedule="cosine")
    expected, found = trained(config), trained(config, save_at)
    assert found.last_loss == expected.last_loss
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_published_schedule_drops_before_its_warm_up_is_over():
    epoch = 782  # 50,000 images in batches of 64
    schedule = Schedule(0.1, 50 * epoch, 20_000, "steps", (25 * epoch, 32 * epoch), 0.1)
    assert schedule(0) == pytest.approx(0.1 / 20_000)
    assert schedule(25 * epoch - 1) == pytest.approx(0.1 * 25 * epoch / 20_000)  # still warming up
    assert schedule(25 * epoch) == pytest.approx(0.01)  # the drop wins
    assert schedule(32 * epoch) == pytest.approx(0.001)


def test_cosine_and_linear_fall_to_zero():
    for kind in ("cosine", "linear"):
        schedule = Schedule(1.0, 100, 10, kind)
        assert schedule(9) == 1.0
        assert schedule(10) == 1.0
        assert 0 < schedule(99) < 0.02
        assert schedule(55) == pytest.approx(0.5)


def test_evaluation_counts_right_answers():
    data = load("digits")
    engine = Engine(Experiment(), data, 0)

    class Always(nn.Module):
        def forward(self, x):
            return torch.eye(10)[torch.full((len(x),), 3)] * 100

    accuracy, loss = engine.evaluate(Always(), engine.test_set)
    share = (data.test.labels == 3).float().mean().item()
    assert accuracy == pytest.approx(share)
    assert loss == pytest.approx((1 - share) * 100, rel=1e-4)
    assert math.isfinite(loss)

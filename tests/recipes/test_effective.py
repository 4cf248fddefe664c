"""Effective density and multiplications on networks small enough to count by hand."""

import pytest
import torch
from torch import nn

from ap import Masks
from recipes.effective import effective


def test_a_unit_without_input_leaves_its_output_idle():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    masks = Masks(model)
    masks.remove({"0.weight": torch.tensor([[True, True, True], [False, False, True]])})
    found = effective(model, masks, (3,))
    assert masks.density == pytest.approx(6 / 10)
    assert found.density == pytest.approx((2 + 2) / 10)  # the second unit's two inputs, and its two outputs
    assert (found.macs, found.dense_macs) == (6, 10)


def test_a_unit_that_nobody_reads():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    masks = Masks(model)
    masks.remove({"2.weight": torch.tensor([[True, False]])})
    assert effective(model, masks, (3,)).density == pytest.approx((3 + 1) / 8)


def test_a_residual_path_keeps_weights_effective():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()

        def forward(self, x):
            return self.b(x + self.act(self.a(x)))

    model = Residual()
    masks = Masks(model)
    with pytest.warns(UserWarning, match=r"left no weight in a\.weight"):
        masks.remove({"a.weight": torch.ones(2, 2, dtype=torch.bool)})
    assert effective(model, masks, (2,)).density == pytest.approx(4 / 8)  # b is fed by the identity


def test_convolutions_count_positions():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    masks = Masks(model)
    found = effective(model, masks, (1, 4, 4))
    assert found.dense_macs == found.macs == 2 * 9 * 16 + 32 * 3
    masks.remove({"0.weight": torch.arange(18).view(2, 1, 3, 3) < 9})  # the first channel
    found = effective(model, masks, (1, 4, 4))
    assert found.macs == 9 * 16 + 32 * 3
    assert found.density == pytest.approx((9 + 16 * 3) / (18 + 96))


def test_nothing_of_the_model_is_changed():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    effective(model, Masks(model), (3,))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

"""A pruner, an activation and a criterion for AP of one's own: each a few lines, each then known by its name."""

import torch
import torch.nn.functional as F
from torch import nn

import pruners
from ap import activations, criteria, measure_dnr, prune_iteratively
from recipes.data import load

digits = load("digits")
x, y = digits.normalise(digits.train.images).flatten(1), digits.train.labels
test_x, test_y = digits.normalise(digits.test.images).flatten(1), digits.test.labels


@pruners.register("relative")
def relative(model, masks):
    """Magnitude in units of the layer's mean magnitude, so that no layer is emptied; higher = keep."""
    weights = {name: masks.weight(name).detach().abs() for name in masks}
    return {name: weight / weight[masks[name]].mean() for name, weight in weights.items()}


class SoftReLU(nn.Module):
    """x² / (1 + x) for positive x: differentiable at 0, and dead where ReLU is."""

    dead_range = (-torch.inf, 0.0)  # outputs nothing and learns nothing for these pre-activations

    def forward(self, x):
        x = x.relu()
        return x * x / (1 + x)


activations.register("soft-relu", SoftReLU)


@criteria.register("least-moved-relatively")
def least_moved_relatively(layer):
    """Negative weights that moved least in relation to where they started; lowest goes first, inf never."""
    return torch.where(layer.weight < 0, layer.movement / layer.start.abs(), torch.inf)


def train(model, masks, run):
    """One training of the loop; what it returns goes into the loop's history."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    report = measure_dnr(model, [test_x])
    return {"accuracy": (model(test_x).argmax(1) == test_y).double().mean(), "dead": report.total}


for ap in ("none", "lite"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    print(f"ap={ap}, {activations.swap(model, 'soft-relu')} activations swapped")
    history = prune_iteratively(
        model,
        train,
        pruners.create("relative"),
        cycles=5,
        amount=0.3,
        ap=ap,
        rate=0.03,
        criterion="least-moved-relatively",
    )
    for row in history:
        print(f"  density {row['density']:6.1%}: accuracy {row['accuracy']:.1%}, dead neurons {row['dead']:.1%}")

"""Iterative pruning: train, zero the smallest weights, rewind to the first ones, again; 20 % of the weights a cycle.

loop.py does it as one would without AP; loop_with_ap.py with it, at the same density: of the 20 %, 18 % are the
pruner's choice and 2 % are AP's, which takes weights that keep neurons dead. `diff -w` of the two shows three lines.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ap import AP
from recipes.data import load

digits = load("digits")
x, y = digits.normalise(digits.train.images).flatten(1), digits.train.labels
test_x, test_y = digits.normalise(digits.test.images).flatten(1), digits.test.labels


def train(model, epochs=5):
    """SGD that never changes what is zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dead = [weight == 0 for weight in weights]
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, zero in zip(weights, dead, strict=True):
                    weight[zero] = 0


@torch.no_grad()
def prune(model, share):
    """Zeroes this share of the weights that are not zero yet: the smallest, of all layers together."""
    alive = torch.cat([weight[weight != 0].abs() for weight in weights])
    threshold = alive.kthvalue(round(share * alive.numel())).values
    for weight in weights:
        weight[weight.abs() <= threshold] = 0


@torch.no_grad()
def rewind(model):
    """Back to the first weights, but for what is zero by now."""
    for parameter, first in zip(model.parameters(), start, strict=True):
        parameter.copy_(first if parameter.dim() == 1 else first * (parameter != 0))


@torch.no_grad()
def evaluate(model):
    """Accuracy, the share of hidden neurons that are dead for an image on average, and of weights that are alive."""
    hidden = model[:2](test_x)
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
    dead = torch.cat([hidden == 0, model[2:4](hidden) == 0], dim=1).double().mean()
    alive = sum(int((weight != 0).sum()) for weight in weights)
    return f"{alive:6} weights alive, {dead:6.1%} of the neurons dead, accuracy {accuracy:.1%}"


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
weights = [model[0].weight, model[2].weight, model[4].weight]
start = [parameter.detach().clone() for parameter in model.parameters()]
plugin = AP(model)
for cycle in range(10):
    rewind(model)
    with plugin.cycle(amount=0.2) as share:
        train(model)
        print(f"cycle {cycle}: {evaluate(model)}")
        prune(model, share)

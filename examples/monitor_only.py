"""No pruning, only looking: what a learning rate does to the neurons, layer by layer, while training.

`tensorboard --logdir runs/monitor` shows the curves: dnr/train/model/static is the share that no image wakes.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ap import DNRMonitor, explain, measure_dnr
from recipes.data import load

digits = load("digits")
x, y = digits.normalise(digits.train.images), digits.train.labels
test_x, test_y = digits.normalise(digits.test.images), digits.test.labels


def train(model, rate, writer, epochs=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    step = 0
    with DNRMonitor(model, every=5) as monitor:
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                step += 1
            monitor.log(writer, step)


def create():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )


print("which neurons can die, and why:\n")
print(explain(create(), x[:1]))
for rate in (0.01, 0.1, 0.2):
    torch.manual_seed(0)
    model = create()
    with SummaryWriter(f"runs/monitor/lr-{rate}") as writer:
        train(model, rate, writer)
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
    print(f"\nlearning rate {rate}: accuracy {accuracy:.1%}\n{measure_dnr(model, [test_x])}")

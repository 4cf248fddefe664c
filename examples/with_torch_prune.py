"""AP in a loop that prunes with torch.nn.utils.prune: it reads that module's masks and adds its own weights to them.

The loop's checkpoints, its `weight_orig` and `weight_mask`, and `prune.remove` at the end go on working.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from ap import AP, measure_dnr
from recipes.data import load

digits = load("digits")
x, y = digits.normalise(digits.train.images), digits.train.labels
test_x, test_y = digits.normalise(digits.test.images), digits.test.labels

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(128, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
layers = [(model[0], "weight"), (model[4], "weight"), (model[6], "weight")]


def train(epochs=3):
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


plugin = AP(model)
for cycle in range(5):
    with plugin.cycle(amount=0.3) as share:
        train()
        prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
    alive = sum(int(layer.weight_mask.sum()) for layer, _ in layers)
    print(f"cycle {cycle}: {alive} weights alive in the weight_mask buffers, the pruner's share was {share:.1%}")

train()
plugin.detach()
for layer, name in layers:
    prune.remove(layer, name)
accuracy = (model(test_x).argmax(1) == test_y).double().mean()
print(f"accuracy {accuracy:.1%}; state_dict: {', '.join(model.state_dict())}")
print(measure_dnr(model, [test_x]))

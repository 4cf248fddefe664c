"""A plain loop."""

import torch
import torch.nn.functional as F
from torch import nn

from recipes.data import load

torch.manual_seed(0)
digits = load("digits")
x, y = digits.normalise(digits.train.images).flatten(1), digits.train.labels
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(4):
    for batch in torch.randperm(len(x)).split(50):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
print(loss.item())

"""AP in a torch-pruning loop: that library removes channels for good, AP wakes neurons of the channels that stay.

After `pruner.step()` the layers have new, smaller parameters: a new AP takes over from the zeros that it finds in them,
as the loop makes a new optimizer. (The pruners "structured-…" of this project take masks, optimizer and AP along.)
"""

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from ap import AP, Masks, measure_dnr
from recipes.data import load

digits = load("digits")
x, y = digits.normalise(digits.train.images), digits.train.labels
test_x, test_y = digits.normalise(digits.test.images), digits.test.labels


def train(model, epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    nn.Sequential(nn.Linear(256, 64), nn.ReLU()),
    nn.Linear(64, 10),
)
pruner = tp.pruner.BasePruner(
    model,
    x[:1],
    tp.importance.GroupMagnitudeImportance(),
    iterative_steps=4,
    pruning_ratio=0.75,
    ignored_layers=[model[3]],
)
plugin = AP(model)
for step in range(5):
    plugin.mark_start()
    train(model)
    report = measure_dnr(model, [test_x])
    accuracy = (model(test_x).argmax(1) == test_y).double().mean()
    widths = ", ".join(str(module.weight.shape[0]) for module in model.modules() if hasattr(module, "weight"))
    print(
        f"step {step}: widths {widths}; {plugin.masks.alive} of {plugin.masks.total} weights alive, "
        f"dead neurons {report.total:.1%} (static {report.static:.1%}), accuracy {accuracy:.1%}"
    )
    if step < 4:
        plugin.activate()  # 2 % of the weights
        pruner.step()
        plugin.detach()
        plugin = AP(Masks.from_zeros(model))
print(report)

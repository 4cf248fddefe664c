"""Every pruner on a pretended GPU: the weights that it removes on the CPU, to rounding."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from pretend import OnGPU, pretended  # noqa: F401

import pruners
from ap.masks import Masks
from recipes import models

pytestmark = pytest.mark.usefixtures("pretended")
# A second derivative makes tensors in C++, which sees through the pretence: grasp has to wait for a real device.
PLAIN = [name for name in pruners.names() if not name.startswith("structured-") and name != "grasp"]


def prepared(name="cnn"):
    torch.manual_seed(0)
    model = models.create(name, image_size=8)
    draws = torch.Generator().manual_seed(1)
    batches = [(torch.rand(4, 3, 8, 8, generator=draws), torch.arange(4)) for _ in range(2)]
    return (model, copy.deepcopy(model).to("cuda").to(memory_format=torch.channels_last)), batches


SPREAD = [name for name in PLAIN if "density" in pruners.create(name).takes]


@pytest.mark.parametrize(("name", "density"), [(n, "scope") for n in PLAIN] + [(n, "erk") for n in SPREAD])
def test_the_same_weights_go(name, density):
    both, batches = prepared()
    found = []
    for model in both:
        masks = Masks(model)
        rounds = {"rounds": 2} if "rounds" in pruners.create(name).takes else {}
        pruner = pruners.create(name, **rounds, **({} if density == "scope" else {"density": density}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nm names the first convolution
            pruner.prune(model, masks, 0.5, batches=batches, loss_fn=F.cross_entropy)
        found.append(masks)
    assert found[0].alive == found[1].alive
    assert all(isinstance(found[1][n], OnGPU) for n in found[1])
    different = sum(int((found[0][n] != found[1][n].cpu()).sum()) for n in found[0])
    assert different <= 1e-3 * found[0].total  # sums in another order may swap neighbours in the ranking


def test_lamp_where_only_deterministic_algorithms_may_be_used(monkeypatch):
    both, _ = prepared()
    expected = pruners.create("lamp").scores(both[0], Masks(both[0]))
    asked = []
    monkeypatch.setattr(torch.Tensor, "cumsum_", lambda self, *args: asked.append(self.device.type) or self)
    torch.use_deterministic_algorithms(True)
    try:
        pruners.create("lamp").scores(both[1], Masks(both[1]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == ["cpu"] * len(expected)  # CUDA has none for floats


@pytest.mark.parametrize("name", [name for name in pruners.names() if name.startswith("structured-")])
def test_structured_pruning(name):
    both, batches = prepared("resnet20" if name == "structured-bn-scale" else "cnn")
    kept = []
    for model in both:
        masks = Masks(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        masks.bind(optimizer)
        device = next(model.parameters()).device
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(batches[0][0].to(device)), batches[0][1].to(device)).backward()
            optimizer.step()
            pruners.create(name).prune(model, masks, 0.25, batches=batches, loss_fn=F.cross_entropy)
        assert all(masks[n].shape == masks.weight(n).shape for n in masks)
        kept.append((masks, [tuple(p.shape) for p in model.parameters()]))
    assert kept[0][1] == kept[1][1]
    assert all(isinstance(p, OnGPU) for p in both[1].parameters())

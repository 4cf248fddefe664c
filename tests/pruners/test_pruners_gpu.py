"""The same weights go on a CUDA device as on the CPU. Run with `scripts/test -m gpu`."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruners
from ap.compaction import compact, compare
from ap.masks import Masks
from recipes import models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _all_bits(monkeypatch):
    """Convolutions in float32, and not in the ten bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def prepared(device):
    torch.manual_seed(0)
    model = models.create("cnn", image_size=8).to(device)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8)) for _ in range(2)]
    return model, Masks(model), batches


@pytest.mark.parametrize("name", [name for name in pruners.names() if not name.startswith("structured-")])
def test_masks_equal_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        model, masks, batches = prepared(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nm names the first convolution
            amount = 0.5 if name == "nm" else 0.4
            pruners.create(name).prune(model, masks, amount, batches=batches, loss_fn=F.cross_entropy)
        found.append(masks)
    different = sum(int((found[0][n] != found[1][n].cpu()).sum()) for n in found[0])
    assert found[0].alive == found[1].alive
    assert different <= 0.01 * found[0].total  # rounding of gradients may swap neighbours in the ranking


@pytest.mark.parametrize("name", [name for name in pruners.names() if name.startswith("structured-")])
def test_structured_pruning_runs_on_the_device(name):
    model, masks, batches = prepared("cuda")
    if name == "structured-bn-scale":
        model = models.create("resnet20", image_size=8).cuda()
        masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    masks.bind(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batches[0][0].cuda()), batches[0][1].cuda()).backward()
        optimizer.step()
        pruners.create(name).prune(model, masks, 0.25, batches=batches, loss_fn=F.cross_entropy)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert all(masks[n].is_cuda and masks[n].shape == masks.weight(n).shape for n in masks)


def test_compaction_on_the_device():
    model, _, _ = prepared("cuda")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and len(layer.weight) > 10:
                layer.weight[::3] = 0
    x = torch.rand(4, 3, 8, 8, device="cuda")
    before = copy.deepcopy(model)
    small = compact(model, x)
    torch.testing.assert_close(small(x), before(x), rtol=1e-3, atol=1e-4)
    result = compare(model, small, x, rounds=3)
    assert result.parameters[1] < result.parameters[0]

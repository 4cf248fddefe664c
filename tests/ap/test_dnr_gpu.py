"""The monitor on a CUDA device: the CPU's counts, and nothing waits for the device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ap.dnr import DNRMonitor, measure_dnr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8, init=0.0), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.act(self.conv(x)) - 0.2)
        return F.hardswish(self.linear(x.mean((2, 3))) * 10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_counts_of_the_device_are_those_of_its_own_values(layout):
    torch.manual_seed(0)
    model = Net().cuda().to(memory_format=layout)
    batches = [torch.randn(n, 3, 16, 16, device="cuda").to(memory_format=layout) for n in (300, 64)]
    report = measure_dnr(model, batches)
    with torch.no_grad():
        z = torch.cat([model.conv(x) for x in batches]).cpu()
    alive, inputs = report.layers["act"].alive_counts()
    assert inputs == 364
    assert torch.equal(alive.cpu().long(), (z > 0).sum(0))


def test_an_observed_pass_never_waits():
    model = Net().cuda()
    x = torch.randn(64, 3, 16, 16, device="cuda")
    with DNRMonitor(model, every=1) as monitor:
        model(x).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert monitor.report().layers["act"].samples == 256


def test_outputs_are_the_same_to_the_bit():
    model = Net().cuda()
    twin, x = copy.deepcopy(model), torch.randn(64, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), DNRMonitor(model, every=1):
        assert torch.equal(model(x), twin(x))


def test_compiled_counts():
    model = Net().cuda()
    compiled, x = torch.compile(model), torch.randn(64, 3, 16, 16, device="cuda")
    with DNRMonitor(compiled, every=2) as monitor, DNRMonitor(copy.deepcopy(model), every=2) as plain:
        for _ in range(3):
            compiled(x)
            plain.model(x)
    for name, layer in plain.report().layers.items():
        assert monitor.report().layers[name].total == pytest.approx(layer.total, abs=1e-4)

"""Counts of passes that are made again without Python: summed in place, told of later."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ap.activations
from ap import DNRMonitor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 12), nn.PReLU(12, init=0.0)
        self.helu, self.last = ap.activations.create("helu"), nn.Linear(12, 5)

    def forward(self, x):
        return F.relu(self.last(self.helu(self.act(self.linear(x))) - 0.3))


def rows(report):
    return report.passes, [(d.name, d.samples, d.total, d.static, d.gradient_total) for d in report.layers.values()]


def test_a_recording_tells_the_same_as_passes_one_by_one():
    torch.manual_seed(0)
    model, batches = Net(), torch.randn(5, 16, 6)
    with DNRMonitor(model, every=1) as monitor:
        for x in batches:
            model(x)
        expected = rows(monitor.report("train"))
    with DNRMonitor(model, every=3) as monitor:
        recording = monitor.record()
        with monitor.into(recording):
            model(torch.randn(16, 6))  # warming up
            recording.clear()
            for x in batches[:2]:
                model(x)
                recording.passes += 1
        assert monitor.report("train").passes == 2
        with monitor.into(None):
            model(torch.randn(16, 6))  # seen by nobody
        with monitor.into(recording):
            for x in batches[2:]:
                model(x)
                recording.passes += 1
        assert rows(monitor.report("train")) == expected
        monitor.reset()
        with pytest.raises(ValueError, match="no train pass"):
            monitor.report("train")


def test_ordinary_passes_and_recordings_add_up_in_one_window():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 6)
    with DNRMonitor(model, every=1) as monitor:
        model(x)
        recording = monitor.record()
        with monitor.into(recording):
            model(x)
            recording.passes += 1
        model(x)
    report = monitor.report()
    assert report.passes == 3
    assert report.layers["act"].samples == 24
    assert rows(monitor.report()) == rows(report)  # handed over once


def test_the_cadence_of_passes_without_python_is_that_of_passes():
    model, x = Net(), torch.randn(8, 6)
    with DNRMonitor(model, every=3) as first, DNRMonitor(model, every=3) as second:
        observed = []
        for _ in range(8):
            before = sum(window.own.passes for window in first._window.values())
            model(x)
            observed.append(sum(window.own.passes for window in first._window.values()) > before)
        second.reset()
        assert [second.due() for _ in range(8)] == observed

"""Scalars, pictures and layout, with a writer that only notes and with TensorBoard's own."""

import numpy as np
import pytest
import torch
from torch import nn

from ap import tensorboard
from ap.dnr import DNRMonitor


class Notes:
    """A writer with add_scalar alone."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.scalars[tag, step] = value


def watched():
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Tanh()))


def test_each_log_is_its_own_window_and_the_report_is_everything():
    model, notes = watched(), Notes()
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[1.0, -1.0]]))
        monitor.log(notes, 10)
        model(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        model.eval()(torch.tensor([[-1.0, -1.0]]))
        monitor.log(notes, 20)
        monitor.log(notes, 30)  # nothing was observed since
    s = notes.scalars
    assert {tag for tag, _ in s} == {
        f"dnr/{mode}/{name}/{rate}"
        for mode in ("train", "eval")
        for name in ("1.0", "model", "mean_over_layers")
        for rate in ("total", "static", "dynamic")
    }
    assert (s["dnr/train/1.0/total", 10], s["dnr/train/1.0/static", 10]) == (0.5, 0.5)
    assert (s["dnr/train/1.0/total", 20], s["dnr/train/model/dynamic", 20]) == (0.5, 0.5)
    assert (s["dnr/eval/model/total", 20], s["dnr/eval/model/dynamic", 20]) == (1.0, 0.0)
    assert {step for _, step in s} == {10, 20}
    assert monitor.report("train").static == 0.0  # over both windows, each unit was alive once
    assert monitor.report("train").layers["1.0"].samples == 3
    assert [(entry.step, entry.mode, entry.model.total) for entry in monitor.history] == [
        (10, "train", 0.5),
        (20, "train", 0.5),
        (20, "eval", 1.0),
    ]


def test_no_gradient_is_written_where_it_differs():
    class Surrogate(nn.Module):
        dead_range, gradient_dead_range = (-float("inf"), 0.0), (-float("inf"), -0.5)

        def forward(self, x):
            return x.clamp(min=0)

    model, notes = nn.Sequential(nn.Flatten(), Surrogate()), Notes()
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[-1.0, -0.2, 0.3, -0.5]]))
    monitor.log(notes, 1)
    assert (notes.scalars["dnr/train/1/total", 1], notes.scalars["dnr/train/1/no_gradient", 1]) == (0.75, 0.5)


def history(densities=(None,)):
    model, notes = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), Notes()
    with DNRMonitor(model, every=1) as monitor:
        for cycle, density in enumerate(densities):
            for step in range(3):
                model(torch.randn(16, 4))
                monitor.log(notes, 100 * cycle + 10 * step, density=density)
    return monitor.history


def test_heat_map_has_a_cell_for_each_layer_and_step():
    entries = history()
    picture = tensorboard.heat_map(entries)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    values = np.array([[entry.layers[name].total for entry in entries] for name in ("1", "3")])
    for colour in tensorboard.colours(values, *tensorboard.limits(values)).reshape(-1, 3):
        assert (picture == colour).all(-1).sum() >= 14 * 40  # a cell
    brightness = tensorboard.colours(np.array([0.0, 0.3, 0.7, 1.0])).astype(int).sum(-1)
    assert (np.diff(brightness) > 0).all()
    assert tensorboard.limits(np.array([0.31, 0.52])) == (pytest.approx(0.3), pytest.approx(0.55))
    assert tensorboard.limits(np.array([0.3, 0.3])) == (pytest.approx(0.3), pytest.approx(0.35))


def test_a_long_run_still_makes_a_picture_of_bounded_width():
    rates = tensorboard.Rates(0.5, 0.1, 0.4)
    entries = [tensorboard.LogEntry(step, "train", rates, {"relu": rates}) for step in range(5000)]
    assert tensorboard.heat_map(entries).shape[1] < 1000


def test_density_picture_has_a_row_for_each_density():
    entries = history((1.0, 0.8, 0.64))
    picture = tensorboard.density_picture(entries)
    values = np.array([entry.model.dynamic for entry in entries]).reshape(3, 3)  # [density, step]
    cells = tensorboard.colours(values, *tensorboard.limits(values))
    found = [np.argwhere((picture == colour).all(-1)).min(0) for colour in cells.reshape(-1, 3)]
    assert np.diff([corner[0] for corner in found[::3]]).min() >= 0  # falling densities downwards
    with pytest.raises(ValueError, match="no entry has a density"):
        tensorboard.density_picture(history())
    with pytest.raises(ValueError, match="unknown rate 'dead'"):
        tensorboard.heat_map(entries, rate="dead")
    with pytest.raises(ValueError, match="nothing was logged for 'eval' passes"):
        tensorboard.heat_map(entries, mode="eval")


def test_what_a_writer_lacks_is_skipped():
    tensorboard.write_pictures(Notes(), history((1.0,)), 5)


def test_layout_names_the_tags_that_are_written():
    model, notes = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), Notes()
    with DNRMonitor(model, every=1) as monitor:
        model(torch.randn(2, 4))
    monitor.log(notes, 1)
    charts = tensorboard.layout(monitor.report().layers, ["train"])["dead neurons (train)"]
    tags = {tag for kind, tags in charts.values() for tag in tags}
    assert tags <= {tag for tag, _ in notes.scalars}
    assert {"model", "total by layer", "static by layer", "dynamic by layer"} == set(charts)


def test_tensorboards_own_writer_and_reader(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with SummaryWriter(tmp_path) as writer, DNRMonitor(model, every=1) as monitor:
        for step in range(3):
            model(torch.randn(8, 4))
            monitor.log(writer, step, density=0.5)
        writer.add_custom_scalars(tensorboard.layout(monitor.report().layers))
        tensorboard.write_pictures(writer, monitor.history, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "dnr/train/1/total" in events.Tags()["scalars"]
    written = [event.value for event in events.Scalars("dnr/train/model/dynamic")]
    assert written == pytest.approx([entry.model.dynamic for entry in monitor.history])
    assert set(events.Tags()["images"]) == {"dnr/train/layers_by_step", "dnr/train/density_by_step"}
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_nothing_of_tensorboard_is_imported():
    import subprocess
    import sys

    code = "import sys, ap.dnr, ap.tensorboard; assert not {'tensorboard', 'PIL', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_log_is_one_event_unless_the_writer_has_an_add_scalar_of_its_own(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from torch.utils.tensorboard import SummaryWriter

    class Mine(SummaryWriter):
        def add_scalar(self, tag, value, step):
            super().add_scalar(f"mine/{tag}", value, step)

    def written(writer):
        model, notes = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), Notes()
        with DNRMonitor(model, every=1) as monitor, writer:
            model(torch.randn(8, 4))
            monitor.log(writer, 7)
            tensorboard.write_report(notes, monitor.report("train"), 7)
        events = [list(e.summary.value) for e in EventFileLoader(writer.file_writer_path).Load() if e.step == 7]
        return events, {tag: np.float32(value) for (tag, _), value in notes.scalars.items()}

    def made(kind, folder):
        writer = kind(tmp_path / folder)
        writer.file_writer_path = str(next((tmp_path / folder).iterdir()))
        return writer

    def value(one):  # the loader makes tensors of simple values
        return one.tensor.float_val[0]

    (event,), noted = written(made(SummaryWriter, "own"))
    assert {one.tag: value(one) for one in event} == noted
    events, noted = written(made(Mine, "mine"))
    assert {one.tag.removeprefix("mine/"): value(one) for (one,) in events} == noted
    assert all(one.tag.startswith("mine/dnr/train/") for (one,) in events)

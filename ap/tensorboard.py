"""The monitor's charts: scalars, a layer × step heat map, a step × density picture, a layout.  [ours]

Works with any object that has SummaryWriter's methods, and skips those that it lacks. Nothing of TensorBoard is
imported; pictures need Pillow, as `SummaryWriter.add_image` does.

Tags: `dnr/<train|eval>/<layer>/<total|static|dynamic>`, `…/no_gradient` where that differs from total, and for the
whole model `dnr/<train|eval>/model/…` (mean over units) and `dnr/<train|eval>/mean_over_layers/…`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ap.dnr_report import DNRReport, Rates

RATES = ("total", "static", "dynamic")


@dataclass(frozen=True)
class LogEntry:
    """One log() of one kind of pass.

    Attributes:
        step: the training step.
        mode: "train" or "eval".
        model: the rates of the model, mean over units.
        layers: the rates of each layer that can die.
        density: the share of weights alive then, if it was told.
    """

    step: int
    mode: str
    model: Rates
    layers: Mapping[str, Rates]
    density: float | None = None

    @classmethod
    def of(cls, report: DNRReport, step: int, density: float | None = None) -> LogEntry:
        """The entry of a report."""
        layers = {
            name: Rates(layer.total or 0.0, layer.static or 0.0, layer.dynamic or 0.0)
            for name, layer in report.layers.items()
            if layer.can_die
        }
        return cls(step, report.mode or "all", report.mean_over_units, layers, density)


def write_report(writer: Any, report: DNRReport, step: int) -> None:
    """Writes a report's scalars; an object without `add_scalar` raises AttributeError.

    TensorBoard's own writer gets them as one event, which takes a fraction of the time of an event each; an
    `add_scalar` that was overridden is called for each.
    """
    prefix = f"dnr/{report.mode or 'all'}"
    scalars: dict[str, float] = {}
    for name, layer in report.layers.items():
        if layer.can_die:
            scalars |= {f"{prefix}/{name}/{rate}": getattr(layer, rate) for rate in RATES}
            if layer.gradient_total is not None:
                scalars[f"{prefix}/{name}/no_gradient"] = layer.gradient_total
    for name, rates in (("model", report.mean_over_units), ("mean_over_layers", report.mean_over_layers)):
        scalars |= {f"{prefix}/{name}/{rate}": getattr(rates, rate) for rate in RATES}
    if _is_summary_writer(writer):
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer._get_file_writer().add_summary(Summary(value=values), step)
        return
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, step)


def _is_summary_writer(writer: Any) -> bool:
    module = sys.modules.get("torch.utils.tensorboard.writer")  # whoever made such a writer has imported it
    return module is not None and getattr(writer.add_scalar, "__func__", None) is module.SummaryWriter.add_scalar


def layout(layers: Iterable[str], modes: Sequence[str] = ("train", "eval")) -> dict[str, dict[str, list[Any]]]:
    """A custom-scalars layout, for `writer.add_custom_scalars(layout(report.layers))`: a page that opens ready to read.

    For each kind of pass one chart of the model's three rates, and one chart a rate with all layers.

    Example:
        >>> layout(["fc1.relu"], ["eval"])["dead neurons (eval)"]["total by layer"]
        ['Multiline', ['dnr/eval/fc1.relu/total']]
    """
    layers = list(layers)
    return {
        f"dead neurons ({mode})": {
            "model": ["Multiline", [f"dnr/{mode}/model/{rate}" for rate in RATES]],
            **{f"{rate} by layer": ["Multiline", [f"dnr/{mode}/{name}/{rate}" for name in layers]] for rate in RATES},
        }
        for mode in modes
    }


def heat_map(history: Iterable[LogEntry], mode: str = "train", rate: str = "total") -> np.ndarray:
    """A picture of layers (downwards, in order of execution) × steps (to the right), coloured by rate.

    Returns:
        uint8 [height, width, 3], with the layers' names, the steps and a colour scale.

    Raises:
        ValueError: unknown rate, or nothing of this mode in the history.
    """
    entries = _of_mode(history, mode, rate)
    names = list(dict.fromkeys(name for entry in entries for name in entry.layers))
    missing = Rates(float("nan"), float("nan"), float("nan"))
    values = np.array([[getattr(e.layers.get(name, missing), rate) for e in entries] for name in names])
    return _picture(values, names, [str(e.step) for e in entries], f"{rate} dead-neuron rate ({mode}), layer by step")


def density_picture(history: Iterable[LogEntry], mode: str = "train", rate: str = "dynamic") -> np.ndarray:
    """A picture of densities (downwards, falling) × steps since each density's first log (to the right).

    With the dynamic rate it shows what Liu, Ghosh and Motani (2023) observed [paper]: it falls as more weights are
    pruned, during and after optimisation.

    Returns:
        uint8 [height, width, 3], with labels and a colour scale.

    Raises:
        ValueError: unknown rate, or no entry of this mode with a density in the history.
    """
    rows: dict[float, list[LogEntry]] = {}
    for entry in _of_mode(history, mode, rate):
        if entry.density is not None:
            rows.setdefault(entry.density, []).append(entry)
    if not rows:
        raise ValueError("no entry has a density: log with monitor.log(writer, step, density=masks.density)")
    steps = sorted({entry.step - entries[0].step for entries in rows.values() for entry in entries})
    densities = sorted(rows, reverse=True)
    values = np.full((len(densities), len(steps)), np.nan)
    for i, density in enumerate(densities):
        for entry in rows[density]:
            values[i, steps.index(entry.step - rows[density][0].step)] = getattr(entry.model, rate)
    labels = [f"{100 * density:.3g} %" for density in densities]
    return _picture(values, labels, [str(s) for s in steps], f"{rate} dead-neuron rate ({mode}), density by step")


def write_pictures(writer: Any, history: Sequence[LogEntry], step: int) -> None:
    """Writes the heat map of each kind of pass and, where densities were logged, the step × density picture.

    A writer without `add_image`, or an installation without Pillow, gets none.
    """
    if not hasattr(writer, "add_image") or not _has_pillow():
        return
    for mode in dict.fromkeys(entry.mode for entry in history):
        writer.add_image(f"dnr/{mode}/layers_by_step", heat_map(history, mode), step, dataformats="HWC")
        if any(entry.density is not None for entry in history if entry.mode == mode):
            writer.add_image(f"dnr/{mode}/density_by_step", density_picture(history, mode), step, dataformats="HWC")


def _of_mode(history: Iterable[LogEntry], mode: str, rate: str) -> list[LogEntry]:
    if rate not in RATES:
        raise ValueError(f"unknown rate {rate!r}: one of {', '.join(RATES)}")
    entries = [entry for entry in history if entry.mode == mode]
    if not entries:
        raise ValueError(f"nothing was logged for {mode!r} passes")
    return entries


def _has_pillow() -> bool:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


# Dark to bright, so that it also reads without colour: 0, 1/4, 1/2, 3/4, 1.
_COLOURS = np.array([[13, 8, 60], [110, 20, 125], [200, 60, 90], [250, 150, 50], [250, 250, 160]], dtype=float)
_GREY = np.array([128, 128, 128], dtype=float)


def limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of the colour scale: the range of the values, rounded outwards to steps of 5 %."""
    low = np.floor(np.nanmin(values) * 20 + 1e-9) / 20
    return float(low), float(max(np.ceil(np.nanmax(values) * 20 - 1e-9) / 20, low + 0.05))


def colours(values: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Rates as uint8 colours [..., 3], dark at `low` and bright at `high`; NaN is grey."""
    share = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1), nan=0.0)
    rgb = np.stack([np.interp(share, np.linspace(0, 1, len(_COLOURS)), channel) for channel in _COLOURS.T], axis=-1)
    rgb[np.isnan(values)] = _GREY
    return np.round(rgb).astype(np.uint8)


_MOST_COLUMNS = 640


def _picture(values: np.ndarray, rows: list[str], columns: list[str], title: str) -> np.ndarray:
    """Cells [rows, columns] with labels at the left and below, a title, and a scale at the right."""
    from PIL import Image, ImageDraw, ImageFont

    if len(columns) > _MOST_COLUMNS:  # a long run: evenly spaced steps are shown
        shown = np.linspace(0, len(columns) - 1, _MOST_COLUMNS).round().astype(int)
        values, columns = values[:, shown], [columns[i] for i in shown]
    height = 14  # of a row, and of a line of text
    width = min(40, _MOST_COLUMNS // len(columns))
    low, high = limits(values)
    font = ImageFont.load_default()
    left = 8 + int(max(font.getlength(row) for row in rows))
    cells = np.kron(colours(values, low, high), np.ones((height, width, 1), dtype=np.uint8))
    right, top = left + cells.shape[1], height + 6
    bottom = top + cells.shape[0]
    size = (max(right + 70, left + int(font.getlength(title)) + 8), max(bottom, top + 5 * height) + height + 8)
    image = Image.new("RGB", size, "white")
    image.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left, 2), title, fill="black", font=font)
    for i, row in enumerate(rows):
        draw.text((4, top + i * height + 1), row, fill="black", font=font)
    last = -1.0
    for i, column in enumerate(columns):  # as many as there is room for
        x = left + i * width
        if x >= last:
            draw.text((x, bottom + 2), column, fill="black", font=font)
            last = x + font.getlength(column) + 8
    for i, level in enumerate(np.linspace(high, low, 5)):
        y = top + i * height
        image.paste(tuple(int(c) for c in colours(np.array(level), low, high)), (right + 10, y, right + 24, y + height))
        draw.text((right + 28, y + 1), f"{100 * level:.3g} %", fill="black", font=font)
    return np.asarray(image)

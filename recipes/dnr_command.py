"""python -m recipes dnr: the dead-neuron rates of any model on any data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from ap import measure_dnr
from recipes import experiment, plots
from recipes.config import Experiment
from recipes.data import ImageData, ImageSet
from recipes.engine import device_of
from recipes.options import read
from recipes.resident import Resident
from recipes.storage import write_json


@dataclass(frozen=True)
class DNR:
    """The dead-neuron rates of a model on data: a table, and on request a chart and JSON."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A name that `list` shows, torchvision/NAME, package.module:factory, or a run's folder: its network and data."""
    data: str = "digits"
    """A data set, or a folder of images."""
    data_root: str | None = None
    """Where the data's files are; $AP_DATA or ./data if not given."""
    download: bool = False
    """Whether missing data may be downloaded."""
    weights: str | None = None
    """A file of weights: safetensors, or a torch state dict or checkpoint."""
    activation: str | None = None
    """The activation; the model's own if not given."""
    split: Annotated[str, tyro.conf.arg(metavar="train|val|test")] = "test"
    """Which images."""
    images: int = 1000
    """How many."""
    image_size: int | None = None
    """For a folder of images: the side in pixels they are resized to."""
    device: str = "auto"
    """cpu, cuda …"""
    json: Path | None = None
    """Write the report as JSON here."""
    plot: Path | None = None
    """Write a bar chart of the layers here (PNG)."""


def main(arguments: list[str]) -> None:
    """The command."""
    if not arguments:
        raise ValueError("dnr needs a model first: one of `python -m recipes list`, or the folder of a run")
    options = read(DNR, arguments, "python -m recipes dnr")
    if options.split not in ("train", "val", "test"):
        raise ValueError(f"--split must be train, val or test, not {options.split!r}")
    if options.images < 1:
        raise ValueError(f"--images must be 1 or more, not {options.images}")
    device = device_of(options.device)
    config, data, model, about = _chosen(options)
    part: ImageSet = getattr(data, options.split)
    count = min(options.images, len(part))
    images = Resident(ImageSet(part.images[:count], part.labels[:count]), data, device)
    found = measure_dnr(model.to(device), images.batches(size=100))
    print(found)
    if options.json:
        about |= {"data": config.data, "split": options.split, "images": count, "image_size": data.image_size}
        write_json(options.json, {"schema": 1, "model": options.model, **about, **found.to_dict()})
    if options.plot:
        plots.bars(found, options.plot, f"{options.model} on {config.data} ({options.split}, {count} images)")


def _chosen(options: DNR) -> tuple[Experiment, ImageData, nn.Module, dict[str, Any]]:
    folder = Path(options.model)
    if (folder / "config.json").exists():
        if options.weights or options.activation or options.data != DNR.data:
            raise ValueError(f"{folder} is a run: its weights, activation and data are its own")
        experiment.refuse_code_inside(folder, experiment.load(folder.parent))
        config, data, model, row = experiment.last_network(folder)
        return config, data, model, {"cycle": row["cycle"], "density": row["density"], "activation": config.activation}
    if folder.is_dir() and len(folder.parts) > 1 and not options.model.startswith("torchvision/"):
        experiment.last_network(folder)  # says what to name instead
    names = ("model", "data", "data_root", "download", "weights", "activation", "image_size", "device")
    config = Experiment(**{name: getattr(options, name) for name in names})
    data = experiment.load_data(config)
    model = experiment.build(config, data, 0)
    if options.weights is None:
        print("no --weights given: these are random initial weights", file=sys.stderr)
    return config, data, model, {"weights": options.weights, "activation": options.activation}

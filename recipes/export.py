"""A pruned model as files that others can use: compacted, as safetensors and ONNX, with a card of how it was made."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ap.compaction import Comparison, compact, compare, fit_
from ap.masks import Masks
from recipes.storage import plain, write_whole

Format = Literal["safetensors", "onnx"]


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and how."""

    out: Path
    """Folder for the files; made if it does not exist."""
    compacted: bool = True
    """Remove dead channels and units physically; the outputs stay the same."""
    formats: tuple[Format, ...] = ("safetensors", "onnx")
    """Which files to write beside the model card."""
    rounds: int = 11
    """Timed forward passes before and after compaction; their medians go into the card."""
    name: str = "model"
    """The files' name without ending."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        model: the model that was exported, compacted if that was asked for.
        files: the files by format, and the card as "card".
        comparison: parameters, MACs and latency before and after.
        density: the share of the prunable weights that are not zero, before compaction.
    """

    model: nn.Module
    files: dict[str, Path]
    comparison: Comparison
    density: float


def export(model: nn.Module, example_input: Tensor, config: ExportConfig, made: Mapping[str, Any]) -> Exported:
    """Writes a trained and pruned model in the formats asked for, with a model card.

    Args:
        model: the model with its dead weights at zero; it is not changed.
        example_input: [N, …], fixes the input's shape; ONNX files take any batch size N.
        config: what to write, and where.
        made: how the model was made, for the card: anything that JSON can hold, e.g. an experiment's configuration and
            the last row of its metrics, under headings of your choice.

    Raises:
        ImportError: a format's library is missing; the message names the extra.
        ValueError: an unknown format or none, no rounds, or a name that leads elsewhere.
    """
    if config.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, not {config.rounds}")
    if not config.name or Path(config.name).name != config.name:
        raise ValueError(f"--name must be the name of a file, not {config.name!r}: the folder is --out")
    if not config.formats:
        raise ValueError("--formats: give safetensors, onnx or both")
    for kind in config.formats:
        if kind not in ("safetensors", "onnx"):
            raise ValueError(f"format must be safetensors or onnx, not {kind!r}")
    before = copy.deepcopy(model).eval()
    density = _density(before)
    small = compact(before, example_input).eval() if config.compacted else before
    comparison = compare(before, small, example_input, rounds=config.rounds)
    files: dict[str, Path] = {}
    for kind in config.formats:
        path = config.out / f"{config.name}.{kind}"
        write_whole(path, _safetensors(small) if kind == "safetensors" else _onnx(small, example_input))
        files[kind] = path
    files["card"] = config.out / "README.md"
    write_whole(files["card"], _card(example_input, config, made, comparison, density, files))
    return Exported(small, files, comparison, density)


def load(model: nn.Module, path: Path) -> nn.Module:
    """Loads an exported safetensors file into a model of the full architecture, whose layers shrink to fit.

    Raises:
        ValueError: the file is of another architecture.
    """
    from safetensors.torch import load_file

    return fit_(model, load_file(path))


def _density(model: nn.Module) -> float:
    masks = Masks(model)
    nonzero = sum(int(torch.count_nonzero(masks.weight(name).detach())) for name in masks)
    return nonzero / masks.total


def _safetensors(model: nn.Module) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'activate-while-pruning[recipes]'") from error
    # Parameters that several layers share would be refused: each gets its own copy.
    return save({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()})


def _onnx(model: nn.Module, example_input: Tensor) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files need onnx and onnxscript: pip install 'activate-while-pruning[export]', "
            "or leave them out with --formats safetensors"
        ) from error
    # Two samples, since a batch of one would be taken for a constant.
    sample = example_input[:1].repeat(2, *(1,) * (example_input.dim() - 1))
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"], "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters' own deprecations
        try:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(model, (sample,), dynamo=True, dynamic_shapes=shapes, **names)
        except torch.onnx.OnnxExporterError:  # torch 2.6 with a newer onnxscript: the older exporter does it
            file = io.BytesIO()
            axes = {name: {0: "batch"} for name in ("input", "output")}
            torch.onnx.export(model, (sample,), file, dynamo=False, dynamic_axes=axes, **names)  # type: ignore[arg-type]
            return file.getvalue()
    assert program is not None
    return program.model_proto.SerializeToString()


def _card(
    example_input: Tensor,
    config: ExportConfig,
    made: Mapping[str, Any],
    comparison: Comparison,
    density: float,
    files: Mapping[str, Path],
) -> str:
    """The model card: how it was made, what compaction saved, the files, and how to load them."""
    shape = ["N", *example_input.shape[1:]]
    rows = [
        f"| `{path.name}` | {path.stat().st_size:,} bytes | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
        for kind, path in files.items()
        if kind != "card"
    ]
    parts = [
        f"# {config.name}",
        f"A pruned network: {density:.2%} of its prunable weights are not zero. Input: float32 {shape}, normalised as "
        "in training. " + ("Dead channels were removed; the outputs are the same." if config.compacted else ""),
        "## Before and after compaction",
        f"```text\n{comparison}\n```",
        f"Latency: median of {config.rounds} interleaved passes of a batch of {len(example_input)} on "
        f"{example_input.device.type} ({platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}).",
        "## Files",
        "| file | size | sha256 |\n| --- | --- | --- |\n" + "\n".join(rows),
    ]
    if "safetensors" in files:
        parts.append(
            "Weights by the names of the full architecture, whose layers shrink to fit:\n\n```python\n"
            f'from recipes.export import load\nmodel = load(full_size_model, "{files["safetensors"].name}")\n```'
        )
    parts.append("## How it was made")
    for heading, value in made.items():
        parts += [f"### {heading}", f"```json\n{json.dumps(plain(value), indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"

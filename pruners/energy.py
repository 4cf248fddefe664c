"""What arrives at and leaves each channel in a model's graph: sums of squared weights, through norms and additions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ap.graph import ModelGraph, Node

_PASSES = ("activation", "pool", "dropout", "flatten", "reshape", "slice", "identity", "norm")


class Energies:
    """Squared weights summed over paths between neighbouring layers, per channel.

    `into(path)` is, for each input channel of a layer, the sum over all layers that feed it of their squared weights
    into that channel, times the squared scale of the norms between; `out_of(path)` the same for what reads its outputs.
    A vector of one element stands for all channels; None: the graph cannot be followed there.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self._graph = graph
        self._incoming: dict[Node, Tensor | None] = {}
        self._outgoing: dict[Node, Tensor | None] = {}
        self._energies: dict[nn.Module | None, Tensor | None] = {}
        for node in graph:
            self._incoming[node] = self._arriving(node)
        for node in reversed(graph.nodes):
            self._outgoing[node] = self._leaving(node)

    def into(self, path: str) -> Tensor | None:
        """[C_in], what arrives at each input channel of the layer at this path; 1 at the model's input."""
        calls = self._graph.calls(path)
        found = [self._stretched(self._incoming[call.inputs[0]], call) if call.inputs else None for call in calls]
        return _total(found) if calls else None

    def out_of(self, path: str) -> Tensor | None:
        """[C_out], what leaves each output channel of the layer at this path; 1 at the model's output."""
        calls = self._graph.calls(path)
        found = []
        for call in calls:
            energy = self._energy(call)
            found.append(None if energy is None else _fitted(self._outgoing[call], len(energy)))
        return _total(found) if calls else None

    def _energy(self, node: Node) -> Tensor | None:
        """Squared weights summed over the kernel's positions, [C_out, C_in / groups]; None for other layers."""
        module = node.module
        if module not in self._energies:
            self._energies[module] = _squared(module) if isinstance(module, (nn.Linear, _ConvNd)) else None
        return self._energies[module]

    def _arriving(self, node: Node) -> Tensor | None:
        """What arrives at each channel of the node's value."""
        if node.kind == "input":
            return torch.ones(1)
        if node.kind == "layer":
            energy = self._energy(node)
            return None if energy is None else energy.sum(1)
        if _mixes(node):
            return None
        arriving = [self._incoming[source] for source in node.inputs]
        if node.kind in ("add", "sub"):
            return _total(arriving)
        if node.kind == "concat":
            return _joined(arriving, node)
        if node.kind in _PASSES and arriving:
            return _through(arriving[0], node)
        return None

    def _leaving(self, node: Node) -> Tensor | None:
        """What leaves each channel of the node's value, summed over its readers."""
        parts: list[Tensor | None] = []
        for user in sorted(node.users, key=self._graph.nodes.index):
            parts.append(self._read_by(user, node))
        return _total(parts) if parts else None

    def _read_by(self, user: Node, node: Node) -> Tensor | None:
        if user.kind == "output":
            return torch.ones(1)
        if user.kind == "layer":
            energy = self._energy(user)
            if energy is None:
                return None
            return energy.view(int(getattr(user.module, "groups", 1)), -1, energy.shape[1]).sum(1).flatten()
        leaving = self._outgoing[user]
        if leaving is None or _mixes(user):
            return None
        if user.kind in ("add", "sub"):
            return leaving
        if user.kind == "concat":
            return self._part_of(leaving, user, node)
        if user.kind in _PASSES:
            return _through(leaving, user, backwards=True)
        return None

    def _stretched(self, vector: Tensor | None, layer: Node) -> Tensor | None:
        """What arrives at a layer: flattened maps give each channel as many neighbouring inputs as it has positions."""
        energy = self._energy(layer)
        if vector is None or energy is None:
            return None
        wanted = energy.shape[1] * int(getattr(layer.module, "groups", 1))
        if len(vector) in (1, wanted):
            return vector
        if isinstance(layer.module, nn.Linear) and wanted % len(vector) == 0:
            return vector.repeat_interleave(wanted // len(vector))
        return None

    def _part_of(self, leaving: Tensor, concat: Node, node: Node) -> Tensor | None:
        """The channels of a concatenation's value that come from `node`."""
        if leaving.numel() == 1:
            return leaving
        sizes = [self._incoming[source] for source in _concatenated(concat)]
        if any(size is None or size.numel() == 1 for size in sizes):
            return None
        lengths = [len(size) for size in sizes if size is not None]
        if sum(lengths) != len(leaving):
            return None
        parts = leaving.split(lengths)
        return _total([part for part, source in zip(parts, _concatenated(concat), strict=True) if source is node])


def _squared(layer: nn.Linear | _ConvNd) -> Tensor:
    """[C_out, C_in / groups], float64 on the CPU."""
    square = layer.weight.detach().float().square()
    square = square.reshape(*square.shape[:2], -1).sum(2).to("cpu", torch.float64)
    if isinstance(layer, _ConvNd) and layer.transposed:  # [C_in, C_out / groups]: seen as an ordinary one's
        grouped = square.view(layer.groups, -1, square.shape[1])
        return grouped.transpose(1, 2).reshape(-1, grouped.shape[1])
    return square


def _plain(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float64)


def _fitted(vector: Tensor | None, channels: int) -> Tensor | None:
    """What leaves `channels` channels: the reverse of stretching."""
    if vector is None or len(vector) in (1, channels):
        return vector
    return vector.view(channels, -1).sum(1) if len(vector) % channels == 0 else None


def _total(parts: list[Tensor | None]) -> Tensor | None:
    """The sum, None if any part is unknown or of another number of channels."""
    known = [part for part in parts if part is not None]
    if not parts or len(known) != len(parts):
        return None
    longest = min((len(part) for part in known if len(part) > 1), default=1)
    fitted = [_fitted(part, longest) for part in known]
    if any(part is None for part in fitted):
        return None
    return torch.stack([part.expand(longest) for part in fitted if part is not None]).sum(0)


def _joined(parts: list[Tensor | None], node: Node) -> Tensor | None:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    by_node = dict(zip(node.inputs, parts, strict=True))
    ordered = [by_node[source] for source in _concatenated(node)]
    if node.op not in ("cat", "concat", "concatenate") or axis not in (1, -3):
        return None
    if any(part is None or len(part) == 1 for part in ordered):
        return None
    return torch.cat([part for part in ordered if part is not None])


def _concatenated(node: Node) -> list[Node]:
    tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return [source for source in tensors if isinstance(source, Node)]


def _through(vector: Tensor | None, node: Node, backwards: bool = False) -> Tensor | None:
    """A vector behind (or before) a node that keeps channels apart."""
    if vector is None:
        return None
    if node.kind == "norm":
        scale = _norm_scale(node)
        if scale is None or len(scale) == 1:
            return None if scale is None else vector * scale
        fitted = _fitted(vector, len(scale)) if backwards else vector
        return None if fitted is None or len(fitted) not in (1, len(scale)) else fitted * scale
    if node.op == "pad":
        return _padded(vector, node, backwards)
    return vector


def _norm_scale(node: Node) -> Tensor | None:
    """The squared factor of each channel, [C] or [1]; None for a norm that is no module."""
    module = node.module
    if module is None:
        return None
    weight, variance = getattr(module, "weight", None), getattr(module, "running_var", None)
    square = torch.ones(1) if not isinstance(weight, Tensor) else _plain(weight).square()
    if isinstance(module, _BatchNorm) and isinstance(variance, Tensor):
        square = square / (_plain(variance) + module.eps)
    return square if square.dim() == 1 else None


def _padded(vector: Tensor, node: Node, backwards: bool) -> Tensor | None:
    """Padding of [N, C, H, W] may add channels: the last two numbers of six."""
    widths = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(widths, (tuple, list)) or any(not isinstance(width, int) for width in widths):
        return None
    if len(widths) < 6 or len(vector) == 1:
        return vector
    first, last = widths[4:6]
    return vector[first : len(vector) - last] if backwards else F.pad(vector, (first, last))


def _mixes(node: Node) -> bool:
    """Whether a node that usually keeps channels apart does not."""
    if node.kind == "reshape":
        if node.op in ("expand", "expand_as", "repeat", "tile", "roll", "flip", "channel_shuffle", "pixel_shuffle"):
            return True
        if node.module is not None or node.op in ("pixel_unshuffle", "unfold"):
            return True
        # view, then transpose: a shuffle, or a map made into tokens.
        return any(source.op in ("view", "reshape", "unflatten") for source in node.inputs)
    if node.kind == "slice":
        return not _keeps_channels(node)
    return False


def _keeps_channels(node: Node) -> bool:
    """x[…] that leaves axis 1 whole, or takes one index of it (a token)."""
    if node.op != "getitem":
        return False
    index = node.args[1] if len(node.args) > 1 else None
    if not isinstance(index, (tuple, list)) or len(index) < 2:
        return False
    return isinstance(index[1], int) or index[1] == slice(None)

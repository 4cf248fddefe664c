"""A model's channels, followed through its graph: which belong together, which are constant, which are read.  [ours]

Every channel of a layer's output is an *atom*. Activations and BatchNorm pass atoms on, an addition ties the atoms of
its operands together, a depthwise convolution ties each output to its input, flattening repeats an atom once a
position. Atoms that are tied can only go together, and only if every layer that reads them can do without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ap.graph import ModelGraph, Node

_AS_THEY_ARE = ("dropout", "identity")
_CONSTANT_KEEPING = ("AdaptiveAvgPool", "AdaptiveMaxPool", "MaxPool", "adaptive_avg_pool", "adaptive_max_pool")


@dataclass
class Value:
    """A node's value as channels.

    Attributes:
        atoms: [slots] integers, which atom each slot of the channel axis is.
        constant: [slots] float64, the slot's value where it is the same for every input and position, else NaN.
        axis: the channel axis.
    """

    atoms: np.ndarray
    constant: np.ndarray
    axis: int


@dataclass
class Cut:
    """What one module loses: the rows and columns that stay, and what its bias takes over from the columns that go.

    `width` is the number of channels that a norm or activation has now.
    """

    module: nn.Module
    rows: Tensor
    columns: Tensor
    shift: Tensor | None
    width: int


class Channels:
    """The channels of a model whose graph was found by running it (`trace(model, example_input)`)."""

    def __init__(self, graph: ModelGraph) -> None:
        self._parent: list[int] = []
        self._fixed: list[int] = []
        self._values: dict[Node, Value | None] = {}
        self._readers: list[Node] = []
        self._makers: list[Node] = []
        self._calls: dict[nn.Module, int] = {}
        self._owners: dict[int, int] = {}
        for node in graph:
            if node.module is not None:
                if node.module not in self._calls:
                    for parameter in node.module.parameters():
                        self._owners[id(parameter)] = self._owners.get(id(parameter), 0) + 1
                self._calls[node.module] = self._calls.get(node.module, 0) + 1
        for node in graph:
            value = self._value(node)
            if value is None:
                for source in node.inputs:
                    self._fix(self._values.get(source))
            self._values[node] = value

    def removable(self) -> set[int]:
        """The roots of the atoms that can go."""
        pinned: set[int] = set()
        while True:
            gone = self._fixpoint(pinned)
            for node in self._makers:
                roots = self._roots(self._values[node])
                if len(roots) and gone.issuperset(roots.tolist()):  # every layer keeps a channel
                    pinned.add(int(roots[0]))
                    break
            else:
                return gone

    def free(self) -> dict[str, bool]:
        """Whether every output channel of a layer could go, by the layer's path, as far as the graph is concerned."""
        fixed = {self._root(atom) for atom in self._fixed}
        return {node.target: fixed.isdisjoint(self._roots(self._values[node]).tolist()) for node in self._makers}

    def of(self, path: str) -> list[int]:
        """Which group of tied channels each output channel of the layer at this path belongs to."""
        (node,) = (node for node in self._makers if node.target == path)
        return [int(root) for root in self._roots(self._values[node])]

    def cuts(self, gone: set[int], fold: bool = True) -> Iterator[Cut]:
        """What every module loses, for those that lose anything.

        Args:
            gone: the groups of tied channels that go, from `removable` or `of`.
            fold: whether constants that go are added to the biases of what reads them.
        """
        if not gone:
            return
        for node in [*self._values]:
            value = self._values[node]
            if value is None or node.module is None:
                continue
            rows = self._staying(value, gone)
            if node in self._readers or node in self._makers:
                source = self._values[node.inputs[0]]
                columns = _everything(_weight(node.module).shape[1]) if source is None else self._staying(source, gone)
                shift = self._shift(node, gone) if fold and node in self._readers else None
                width = _weight(node.module).shape[1] if source is None else len(source.atoms)
                if len(rows) < len(value.atoms) or len(columns) < width:
                    yield Cut(node.module, rows, columns, shift, width)
            elif node.kind in ("norm", "activation") and len(rows) < len(value.atoms):
                yield Cut(node.module, rows, rows, None, len(value.atoms))

    # --- which atoms can go ----------------------------------------------------------------------------------------

    def _fixpoint(self, pinned: set[int]) -> set[int]:
        roots = np.array([self._root(atom) for atom in range(len(self._parent))], dtype=np.int64)
        kept = {self._root(atom) for atom in self._fixed} | {self._root(atom) for atom in pinned}
        reads = []
        for node in self._readers:
            source, value = self._values[node.inputs[0]], self._values[node]
            assert source is not None
            assert value is not None
            foldable = ~np.isnan(source.constant) & ((source.constant == 0) | (not _padded(node.module)))
            reads.append((roots[source.atoms], roots[value.atoms], _nonzero(node.module), foldable))
        gone: set[int] = set()
        while True:
            blocked = set(kept)
            lost = np.fromiter(gone, dtype=np.int64, count=len(gone))
            for columns, rows, nonzero, foldable in reads:
                needed = nonzero[~np.isin(rows, lost)].any(0) & ~foldable
                blocked.update(columns[needed].tolist())
            now = set(np.unique(roots).tolist()) - blocked
            if now == gone:
                return gone
            gone = now

    def _shift(self, node: Node, gone: set[int]) -> Tensor | None:
        """[rows], what the constant columns that go add to each output."""
        source = self._values[node.inputs[0]]
        assert source is not None
        leaving = np.isin(self._roots(source), list(gone)) & ~np.isnan(source.constant) & (source.constant != 0)
        if not leaving.any():
            return None
        return torch.from_numpy(_summed(node.module)[:, leaving] @ source.constant[leaving])

    def _staying(self, value: Value, gone: set[int]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(~np.isin(self._roots(value), list(gone))))

    # --- atoms -----------------------------------------------------------------------------------------------------

    def _new(self, count: int) -> np.ndarray:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _roots(self, value: Value | None) -> np.ndarray:
        return np.array([self._root(int(atom)) for atom in value.atoms], dtype=np.int64) if value else np.array([])

    def _tie(self, a: np.ndarray, b: np.ndarray) -> None:
        for x, y in zip(a, b, strict=True):
            self._parent[self._root(int(y))] = self._root(int(x))

    def _fix(self, value: Value | None) -> None:
        if value is not None:
            self._fixed.extend(value.atoms.tolist())

    # --- what each node does to channels; None: they cannot be followed ----------------------------------------------

    def _value(self, node: Node) -> Value | None:
        rule = getattr(self, f"_{node.kind}", None)
        if node.kind in _AS_THEY_ARE:
            return self._source(node)
        return rule(node) if rule is not None and node.inputs else None

    def _source(self, node: Node) -> Value | None:
        return self._values.get(node.inputs[0]) if node.inputs else None

    def _alone(self, module: nn.Module | None) -> bool:
        """Called once, with parameters that are no other module's and not computed from others."""
        if module is None or self._calls[module] != 1 or "parametrizations" in module._modules:
            return False
        if any(name.endswith("_orig") for name in module._parameters):  # masked by torch.nn.utils.prune
            return False
        return all(self._owners[id(parameter)] == 1 for parameter in module.parameters())

    def _layer(self, node: Node) -> Value | None:
        module, source = node.module, self._source(node)
        if not self._alone(module) or len(node.inputs) != 1 or isinstance(module, _ConvTransposeNd):
            return None
        shape = node.inputs[0].shape or ()
        if isinstance(module, nn.Linear):
            if source is not None and (source.axis != len(shape) - 1 or len(source.atoms) != module.in_features):
                return None
            return self._dense(node, source, len(shape) - 1)
        if not isinstance(module, _ConvNd) or len(shape) != len(module.kernel_size) + 2:
            return None
        if source is not None and (source.axis != 1 or len(source.atoms) != module.in_channels):
            return None
        if module.groups == 1:
            return self._dense(node, source, 1)
        if module.groups == module.in_channels and source is not None:
            return self._depthwise(node, source)
        return None

    def _dense(self, node: Node, source: Value | None, axis: int) -> Value:
        nonzero = _nonzero(node.module)
        summed = _summed(node.module)
        constant = _bias(node.module, len(summed))
        if source is None:
            unknown = nonzero.any(1)
        else:
            known = ~np.isnan(source.constant) & ((source.constant == 0) | (not _padded(node.module)))
            unknown = nonzero[:, ~known].any(1)
            constant = constant + summed[:, known] @ source.constant[known]
            self._readers.append(node)
        self._makers.append(node)
        return Value(self._new(len(summed)), np.where(unknown, np.nan, constant), axis)

    def _depthwise(self, node: Node, source: Value) -> Value:
        summed = _summed(node.module)[:, 0]
        times = len(summed) // len(source.atoms)
        arriving = np.repeat(source.constant, times)
        arriving = np.where(_nonzero(node.module).any(1), arriving, 0.0)
        if _padded(node.module):
            arriving = np.where(arriving == 0, 0.0, np.nan)
        self._makers.append(node)
        return Value(np.repeat(source.atoms, times), _bias(node.module, len(summed)) + summed * arriving, source.axis)

    def _norm(self, node: Node) -> Value | None:
        module, source = node.module, self._source(node)
        if not isinstance(module, _BatchNorm) or module.running_var is None or not self._alone(module):
            return None
        if source is None or source.axis != 1 or len(source.atoms) != module.num_features:
            return None
        assert module.running_mean is not None
        scale = 1 / (module.running_var.double() + module.eps).sqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach().double()
        shift = -module.running_mean.double() * scale
        if module.bias is not None:
            shift = shift + module.bias.detach().double()
        factor, offset = scale.cpu().numpy(), shift.cpu().numpy()
        return Value(source.atoms, offset + factor * np.where(factor == 0, 0.0, source.constant), source.axis)

    def _activation(self, node: Node) -> Value | None:
        source = self._source(node)
        if source is None or len(node.inputs) != 1 or node.shape != node.inputs[0].shape:
            return None
        width = len(source.atoms)
        if node.module is not None:
            own = [*node.module.parameters(), *(b for b in node.module.buffers() if b.is_floating_point())]
            per_channel = [value for value in own if value.numel() != 1]
            if per_channel and (source.axis != 1 or not self._alone(node.module)):
                return None
            if any(value.shape != (width,) for value in per_channel):
                return None
        elif any(isinstance(value, Tensor) for value in (*node.args[1:], *node.kwargs.values())):
            return None
        known = ~np.isnan(source.constant)
        shape = [1] * len(node.shape or ())
        shape[source.axis] = width
        values = torch.from_numpy(np.where(known, source.constant, 0.0)).float().view(shape)
        applied = _apply(node, values).double().cpu().numpy().reshape(-1)
        return Value(source.atoms, np.where(known, applied, np.nan), source.axis)

    def _pool(self, node: Node) -> Value | None:
        source, shape = self._source(node), node.inputs[0].shape or ()
        if source is None or node.shape is None or node.op == "logsumexp":
            return None
        if node.op == "pad":
            return self._pad(node, source)
        axis = source.axis
        keeps = node.op in ("mean", "amax", "amin") or node.op.startswith(_CONSTANT_KEEPING)
        if node.op.startswith("AvgPool") and node.module is not None:
            plain = getattr(node.module, "divisor_override", None) is None
            keeps = plain and not any(np.atleast_1d(getattr(node.module, "padding", 1)))
        if node.op in ("mean", "sum", "amax", "amin", "max", "min"):
            dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            if not isinstance(dims, (int, tuple, list)) or node.op in ("max", "min"):
                return None
            reduced = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
            if axis in reduced:
                return None
            if len(node.shape) < len(shape):
                axis -= sum(dim < axis for dim in reduced)
        elif (
            len(node.shape) != len(shape)
            or node.shape[axis] != len(source.atoms)
            or ("Pad" in node.op and getattr(node.module, "value", 0) != 0)
        ):
            return None
        constant = source.constant if keeps else np.where(source.constant == 0, 0.0, np.nan)
        return Value(source.atoms, constant, axis)

    def _pad(self, node: Node, source: Value) -> Value | None:
        """Zero padding, of positions or of channels; added channels cannot go: their number is in the code."""
        widths = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        fill = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        if mode != "constant" or fill not in (None, 0, 0.0) or not isinstance(widths, (tuple, list)):
            return None
        place = 2 * (len(node.inputs[0].shape or ()) - 1 - source.axis)
        before, after = widths[place : place + 2] if len(widths) > place else (0, 0)
        if before < 0 or after < 0:
            return None
        spatial = any(widths[:place]) or any(widths[place + 2 :])
        added = self._new(before + after)
        self._fixed.extend(added.tolist())
        constant = np.where(source.constant == 0, 0.0, np.nan) if spatial else source.constant
        atoms = np.concatenate([added[:before], source.atoms, added[before:]])
        return Value(atoms, np.concatenate([np.zeros(before), constant, np.zeros(after)]), source.axis)

    def _flatten(self, node: Node) -> Value | None:
        source, shape = self._source(node), node.inputs[0].shape or ()
        if source is None or node.shape is None or len(node.shape) != 2 or source.axis != 1 or len(shape) < 2:
            return None
        if node.op in ("view", "reshape"):
            sizes = node.args[1:] if len(node.args) != 2 else np.atleast_1d(np.array(node.args[1], dtype=object))
            if len(sizes) != 2 or sizes[1] != -1:  # a number of features in the code could not shrink
                return None
        elif node.op not in ("Flatten", "flatten"):
            return None
        if node.shape[0] != shape[0]:
            return None
        positions = node.shape[1] // len(source.atoms)
        return Value(np.repeat(source.atoms, positions), np.repeat(source.constant, positions), 1)

    def _reshape(self, node: Node) -> Value | None:
        source, dims = self._source(node), len(node.inputs[0].shape or ())
        given = node.args[1:] if len(node.args) != 2 else _flat(node.args[1])
        if source is None or not given or any(not isinstance(value, int) for value in given):
            return None
        places = [value % dims for value in given] if node.op != "unsqueeze" else [given[0] % (dims + 1)]
        if node.op == "permute":
            axis = places.index(source.axis)
        elif node.op in ("transpose", "swapaxes", "swapdims") and len(places) == 2:
            axis = dict([places, places[::-1]]).get(source.axis, source.axis)
        elif node.op == "unsqueeze":
            axis = source.axis + (places[0] <= source.axis)
        elif node.op == "squeeze" and source.axis not in places and len(node.shape or ()) == dims - len(places):
            axis = source.axis - sum(place < source.axis for place in places)
        else:
            return None
        return Value(source.atoms, source.constant, axis)

    def _slice(self, node: Node) -> Value | None:
        source = self._source(node)
        if source is None or node.op != "getitem" or len(node.args) != 2:
            return None
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(not isinstance(part, (int, slice)) for part in index):
            return None
        if len(index) > source.axis and index[source.axis] != slice(None):
            return None
        return Value(source.atoms, source.constant, source.axis - sum(isinstance(i, int) for i in index[: source.axis]))

    def _add(self, node: Node) -> Value | None:
        return self._combined(node, lambda a, b: a + b)

    def _sub(self, node: Node) -> Value | None:
        return self._combined(node, lambda a, b: a - b) if node.op in ("sub", "isub") else None

    def _mul(self, node: Node) -> Value | None:
        def product(a: Any, b: Any) -> Any:
            return np.where((a == 0) | (b == 0), 0.0, a * b)

        return self._combined(node, product) if node.op in ("mul", "imul", "multiply") else None

    def _combined(self, node: Node, combine: Any) -> Value | None:
        if node.kwargs or len(node.args) != 2:
            return None
        operands = [self._values.get(x) if isinstance(x, Node) else x for x in node.args]
        values = [x for x in operands if isinstance(x, Value)]
        if len(values) == 1 and any(isinstance(x, (int, float)) for x in operands):
            numbers = [x.constant if isinstance(x, Value) else float(x) for x in operands if x is not None]
            return Value(values[0].atoms, combine(*numbers), values[0].axis)
        shapes = [x.shape for x in node.args if isinstance(x, Node)]
        if len(values) != 2 or len(shapes[0] or ()) != len(shapes[1] or ()):
            return None
        a, b = values
        if a.axis != b.axis or len(a.atoms) != len(b.atoms):
            return None
        self._tie(a.atoms, b.atoms)
        return Value(a.atoms, combine(a.constant, b.constant), a.axis)

    def _concat(self, node: Node) -> Value | None:
        parts = [x for x in (node.args[0] if node.args else ()) if isinstance(x, Node)]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if node.op not in ("cat", "concat", "concatenate") or node.shape is None or not isinstance(dim, int):
            return None
        axis = dim % len(node.shape)
        known = [self._values.get(part) for part in parts]
        if not any(known) or any(value is not None and value.axis != axis for value in known):
            return None
        if any(len(part.shape or ()) != len(node.shape) for part in parts):
            return None
        values = []
        for part, value in zip(parts, known, strict=True):
            if value is None:  # what cannot be followed keeps its place and size
                count = (part.shape or ())[axis]
                value = Value(self._new(count), np.full(count, np.nan), axis)
                self._fix(value)
            values.append(value)
        return Value(
            np.concatenate([value.atoms for value in values]), np.concatenate([v.constant for v in values]), axis
        )


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _everything(count: int) -> Tensor:
    return torch.arange(count)


def _weight(module: nn.Module | None) -> Tensor:
    assert isinstance(module, (nn.Linear, _ConvNd))
    return module.weight


def _summed(module: nn.Module | None) -> np.ndarray:
    """[rows, columns], the weights summed over the kernel's positions, float64."""
    weight = _weight(module).detach()
    return weight.reshape(*weight.shape[:2], -1).sum(2, dtype=torch.float64).cpu().numpy()


def _nonzero(module: nn.Module | None) -> np.ndarray:
    """[rows, columns], where any weight of the kernel is not zero."""
    weight = _weight(module).detach()
    return (weight != 0).reshape(*weight.shape[:2], -1).any(2).cpu().numpy()


def _bias(module: nn.Module | None, rows: int) -> np.ndarray:
    bias = getattr(module, "bias", None)
    return np.zeros(rows) if bias is None else bias.detach().double().cpu().numpy()


def _padded(module: nn.Module | None) -> bool:
    """Whether zeros at the border make a constant input not constant."""
    if not isinstance(module, _ConvNd):
        return False
    return module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice)


@torch.no_grad()
def _apply(node: Node, values: Tensor) -> Tensor:
    """An activation of these values, in evaluation mode."""
    if node.module is not None:
        own = next((x for x in [*node.module.parameters(), *node.module.buffers()] if x.is_floating_point()), None)
        was = node.module.training
        node.module.eval()
        try:
            return node.module.forward(values.clone() if own is None else values.to(own.device, own.dtype))
        finally:
            node.module.train(was)
    function = getattr(Tensor, node.function) if isinstance(node.function, str) else node.function
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "inplace", "out")}
    return function(values.clone(), *node.args[1:], **options)

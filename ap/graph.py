"""The model's real graph: what comes before and after each layer.  [ours]

`trace` gives a `ModelGraph` of plain nodes, whichever way it was found: symbolically (torch.fx, every torch.nn and
activation module being one node), or, where the model's code depends on values, by watching one forward pass of
`example_input`. `layer_contexts` answers the questions that activate-while-pruning asks of each layer: is its input
rectified (every element ≥ 0), and what stands between its output and the next activation?
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ap.graph_kinds import activation_traits, preserves_sign


@dataclass(eq=False)
class Node:
    """One call in the model's forward pass.

    Attributes:
        name: dotted module path ("layer1.0.conv1", "layer1.0.relu:2" for a second call), or module path and function
            for a call that is no module ("layer1.0/add", "layer1.0/relu:2", "/relu" in the model's own forward);
            "/input", "/input:2" and "/output". Unique in its graph.
        kind: "layer" (linear, convolution, attention, recurrent), "activation", "norm", "add", "sub", "mul", "pool",
            "dropout", "flatten", "reshape", "slice", "concat", "identity", "matmul", "softmax", "embedding", "input",
            "parameter", "output" or "other".
        op: what is called: the module's class name or the function's short name ("ReLU", "relu", "add").
        target: the module's path, or the parameter's; "" for functions.
        module: the module called; None for functions.
        function: the function called; a method's name where the graph is symbolic; None for modules.
        args, kwargs: the call's arguments, with a `Node` where a value comes from another node and None for values
            computed from shapes.
        inputs: the nodes whose values it uses, in order of first use.
        users: the nodes that use its value.
        shape: its value's shape where the graph was found by running the model, else None.
    """

    name: str
    kind: str
    op: str
    target: str = ""
    module: nn.Module | None = None
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    users: list[Node] = field(default_factory=list)
    shape: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {self.kind}, {self.op})"


class ModelGraph:
    """Nodes of a model in the order of execution, with their producers and consumers.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [node.name for node in graph]
        ['/input', '0', '1', '2', '/output']
        >>> graph["1"].inputs, graph["1"].users
        ([Node('0', layer, Linear)], [Node('2', layer, Linear)])
    """

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self._by_name = {node.name: node for node in nodes}
        self._position = {node: position for position, node in enumerate(nodes)}

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def calls(self, target: str) -> list[Node]:
        """Every call of the module at this path, in order; empty where the forward pass does not reach it."""
        return [node for node in self.nodes if node.module is not None and node.target == target]

    def layers(self) -> list[Node]:
        """Calls of the modules that hold prunable weights, in order."""
        return [node for node in self.nodes if node.kind == "layer" and node.module is not None]

    def activations(self) -> list[Node]:
        """Calls of activations, modules and functions, in order."""
        return [node for node in self.nodes if node.kind == "activation"]

    def nonnegative(self) -> dict[Node, bool]:
        """For each node, whether every element of its value is known to be ≥ 0."""
        known: dict[Node, bool] = {}
        for node in self.nodes:
            if node.kind == "activation":
                known[node] = activation_traits(node).nonnegative
            elif node.kind == "softmax":
                known[node] = True
            else:
                known[node] = preserves_sign(node) and all(known.get(source, False) for source in node.inputs)
        return known

    def path_to_activation(self, start: Node) -> tuple[list[Node], Node | None]:
        """The nodes between `start` and the first activation that its value feeds, and that activation.

        The shortest way counts, then the order of execution. Ways end at the next layer or product of two values.
        Without such an activation the nodes are those from `start` to the first end of a way.
        """
        queue: deque[tuple[list[Node], Node]] = deque(([], user) for user in self._ordered_users(start))
        seen = {start}
        dead_end: list[Node] | None = None
        while queue:
            path, node = queue.popleft()
            if node in seen:
                continue
            seen.add(node)
            if node.kind == "activation":
                return path, node
            if node.kind in ("layer", "matmul", "softmax", "embedding", "output"):
                dead_end = path if dead_end is None else dead_end
                continue
            queue.extend(([*path, node], user) for user in self._ordered_users(node))
        return dead_end or [], None

    def _ordered_users(self, node: Node) -> list[Node]:
        return sorted(node.users, key=self._position.__getitem__)


@dataclass(frozen=True)
class LayerContext:
    """Where one layer stands in its model.

    Attributes:
        name: dotted module path.
        kind: its class name.
        input_rectified: every element of its input is ≥ 0, in every call.
        between: kinds of node between the layer and the first activation that its output feeds, in order: "norm",
            "add", "pool", "dropout", "flatten", "concat" …
        activation: that activation's name as in the dead-neuron report; None if its output feeds none.
        followed_by: what reads its output first, dropout and reshaping aside: "rectifier", "activation", "norm",
            "add", "layer", "pool", "concat" …, or "nothing" at the end of the model.
        feeds_rectifier: whether `activation` is a rectifier: never negative, exactly 0 on a half-line.
    """

    name: str
    kind: str
    input_rectified: bool
    between: tuple[str, ...]
    activation: str | None
    followed_by: str
    feeds_rectifier: bool


_TRANSPARENT = ("dropout", "flatten", "reshape", "slice", "identity")


def trace(model: nn.Module, example_input: Any = None) -> ModelGraph:
    """The graph of the model's forward pass.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        example_input: a tensor, or a tuple of the forward pass's arguments. Needed only where torch.fx cannot trace the
            model; then one pass in eval mode, without gradients, is watched instead (modes are restored afterwards).

    Raises:
        ValueError: torch.fx cannot trace the model and there is no `example_input`.
    """
    from ap.graph_trace import trace_by_running, trace_symbolically

    return trace_symbolically(model) if example_input is None else trace_by_running(model, example_input)


def layer_contexts(model: nn.Module, example_input: Any = None) -> dict[str, LayerContext]:
    """Where each layer with weights stands in the model, by dotted module path, in order of execution.

    Args:
        model: any module.
        example_input: see `trace`.

    Raises:
        ValueError: torch.fx cannot trace the model and there is no `example_input`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> layer_contexts(model)["2"]  # doctest: +NORMALIZE_WHITESPACE
        LayerContext(name='2', kind='Conv2d', input_rectified=True, between=('norm',), activation='4',
                     followed_by='norm', feeds_rectifier=True)
    """
    return contexts_of(trace(model, example_input))


def contexts_of(graph: ModelGraph) -> dict[str, LayerContext]:
    """`layer_contexts` of a graph that is already there."""
    nonnegative = graph.nonnegative()
    contexts: dict[str, LayerContext] = {}
    for layer in graph.layers():
        rectified = bool(layer.inputs) and all(nonnegative[source] for source in layer.inputs)
        if layer.target in contexts:  # called again: rectified only if it is so every time
            first = contexts[layer.target]
            if first.input_rectified and not rectified:
                contexts[layer.target] = LayerContext(**{**vars(first), "input_rectified": False})
            continue
        between, activation = graph.path_to_activation(layer)
        is_rectifier = activation is not None and activation_traits(activation).rectifier
        contexts[layer.target] = LayerContext(
            name=layer.target,
            kind=layer.op,
            input_rectified=rectified,
            between=tuple(node.kind for node in between),
            activation=activation.name if activation is not None else None,
            followed_by=_followed_by(graph, layer, between, activation, is_rectifier),
            feeds_rectifier=is_rectifier,
        )
        if isinstance(layer.module, nn.MultiheadAttention):  # its projections are called inside of it
            outer = contexts[layer.target]
            name = f"{layer.target}.out_proj" if layer.target else "out_proj"
            contexts[name] = LayerContext(**{**vars(outer), "name": name, "kind": "Linear", "input_rectified": False})
    return contexts


def _followed_by(
    graph: ModelGraph, layer: Node, between: list[Node], activation: Node | None, is_rectifier: bool
) -> str:
    for node in between:
        if node.kind not in _TRANSPARENT:
            return node.kind
    if activation is not None:
        return "rectifier" if is_rectifier else "activation"
    last = between[-1] if between else layer
    kinds = [node.kind for node in graph._ordered_users(last)]
    return kinds[0] if kinds and kinds[0] != "output" else "nothing"

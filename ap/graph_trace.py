"""Finding a model's graph: symbolically with torch.fx, or by watching a real forward pass.  [ours]"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ap.activations.ranges import is_activation
from ap.graph import ModelGraph, Node
from ap.graph_kinds import function_kind, module_kind

# torch.nn modules that are made of others: their insides are part of the graph.
_OPEN = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.parallel.DataParallel,
    nn.parallel.DistributedDataParallel,
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, DataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def clean_name(path: str) -> str:
    """A module path without `module.` of parallel wrappers' roots and `_orig_mod.` of torch.compile."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of this module is one node."""
    if is_activation(module):
        return True
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, _OPEN)


class _Names:
    """Unique node names: "relu", "relu:2" for modules, "layer1.0/add", "layer1.0/add:2" for functions."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, base: str) -> str:
        self._seen[base] += 1
        return base if self._seen[base] == 1 else f"{base}:{self._seen[base]}"


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def _replace(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        items = [_replace(item, leaf) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _replace(item, leaf) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_replace(item, leaf) for item in (value.start, value.stop, value.step)))
    return leaf(value)


def _connect(node: Node) -> Node:
    """Fills in `inputs`, and `users` on the other side, from the arguments."""
    for value in _flat([node.args, node.kwargs]):
        if isinstance(value, Node) and value not in node.inputs:
            node.inputs.append(value)
            value.users.append(node)
    return node


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.TransformerEncoderLayer's fused eval path hides its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Tracer(torch.fx.Tracer):
    """torch.fx, with every torch.nn and activation module a leaf, noting the module that each call is made in."""

    def __init__(self) -> None:
        super().__init__()
        self._scopes: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        self._scopes.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["ap_scope"] = self._scopes[-1]
        return node


def trace_symbolically(model: nn.Module) -> ModelGraph:
    """The graph by torch.fx. ValueError, with the remedy, where it cannot be found so."""
    model = unwrap(model)
    if is_leaf(model):  # torch.fx would look into a model that is one torch.nn module
        source = Node("/input", "input", "input")
        call = _connect(Node("", module_kind(model), type(model).__name__, "", model, args=(source,)))
        return ModelGraph([source, call, _connect(Node("/output", "output", "output", args=(call,)))])
    try:
        with _without_fast_path():
            graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when its values are symbols
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be traced symbolically ({reason}); "
            "pass example_input=, a tensor or tuple of arguments, to find its graph by running it once"
        ) from error

    modules = dict(model.named_modules())
    names = _Names()
    nodes: list[Node] = []
    made: dict[torch.fx.Node, Node | None] = {}  # None: a value that is no tensor, such as a size

    def known(value: Any) -> Any:
        return made[value] if isinstance(value, torch.fx.Node) else value

    for old in graph.nodes:
        sources = [made[source] for source in old.all_input_nodes]
        args = _replace(old.args, known)
        kwargs = _replace(dict(old.kwargs), known)
        if old.op == "placeholder":
            node = Node(names("/input"), "input", "input")
        elif old.op == "get_attr":
            node = Node(names(str(old.target)), "parameter", "parameter", str(old.target))
        elif old.op == "output":
            node = Node("/output", "output", "output", args=args)
        elif old.op == "call_module":
            path = str(old.target)
            module = modules[path]
            node = Node(names(clean_name(path)), module_kind(module), type(module).__name__, clean_name(path), module)
            node.args, node.kwargs = args, kwargs
        else:
            kind, short = function_kind(old.target)
            if kind == "meta" or (sources and not any(sources)):
                made[old] = None
                continue
            node = Node(names(f"{clean_name(old.meta['ap_scope'])}/{short}"), kind, short, function=old.target)
            node.args, node.kwargs = args, kwargs
        made[old] = _connect(node)
        nodes.append(node)
    return ModelGraph(nodes)


class _Recorder(TorchFunctionMode):
    """Notes every call on tensors of a forward pass as a node; tensors are known by their identity."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.names = _Names()
        self.scopes = [""]
        self.inside_leaf = 0
        self._producer: dict[int, tuple[Node, Tensor]] = {}  # the tensor is kept so that its id is not used again
        self._stored = {
            id(tensor): name
            for group in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, tensor in group
        }

    def add(self, node: Node, value: Any) -> Node:
        self.nodes.append(_connect(node))
        tensors = [item for item in _flat(value) if isinstance(item, Tensor)]
        for tensor in tensors:
            self._producer[id(tensor)] = (node, tensor)
        if len(tensors) == 1:
            node.shape = tuple(tensors[0].shape)
        return node

    def known(self, value: Any) -> Any:
        """The node that a tensor comes from; other values as they are."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._producer:
            return self._producer[id(value)][0]
        if id(value) in self._stored:
            path = clean_name(self._stored[id(value)])
            return self.add(Node(self.names(path), "parameter", "parameter", path), value)
        return self.add(Node(self.names("constant"), "parameter", "constant"), value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, short = function_kind(func)
        if self.inside_leaf or kind == "meta":
            return func(*args, **kwargs)
        # Looked up before the call, which may write into its arguments.
        node_args, node_kwargs = _replace(args, self.known), _replace(kwargs, self.known)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        version = None if first is None else first._version
        value = func(*args, **kwargs)
        if value is first and first is not None and first._version == version:
            value = first.view_as(first)  # a dropout in eval mode, say: as a new object it can be told from its input
        changed = args[0] if short == "setitem" else value
        if any(isinstance(item, Tensor) for item in _flat(changed)):
            if short == "setitem":
                kind = "slice"
            name = self.names(f"{self.scopes[-1]}/{short}")
            self.add(Node(name, kind, short, function=func, args=tuple(node_args), kwargs=node_kwargs), changed)
        return value


def trace_by_running(model: nn.Module, example_input: Any) -> ModelGraph:
    """The graph of one forward pass of `example_input`, in eval mode and without gradients."""
    model = unwrap(model)
    inputs = tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
    recorder = _Recorder(model)
    handles = []
    pending: list[tuple[Any, Any, Tensor | None, int | None]] = []

    def enter_scope(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            recorder.scopes.append(path)

        return hook

    def leave_scope(module: nn.Module, args: Any, output: Any) -> None:
        recorder.scopes.pop()

    def enter_leaf(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not recorder.inside_leaf:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            version = None if first is None else first._version
            pending.append((_replace(args, recorder.known), _replace(kwargs, recorder.known), first, version))
        recorder.inside_leaf += 1

    def leave_leaf(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            recorder.inside_leaf -= 1
            if recorder.inside_leaf:
                return None
            node_args, node_kwargs, first, version = pending.pop()
            if output is first and first is not None and first._version == version:
                with torch._C.DisableTorchFunction():
                    output = first.view_as(first)
            node = Node(recorder.names(path), module_kind(module), type(module).__name__, path, module)
            node.args, node.kwargs = tuple(node_args), node_kwargs
            recorder.add(node, output)
            return output

        return hook

    was_training = {module: module.training for module in model.modules()}
    try:
        for raw, module in model.named_modules():
            path = clean_name(raw)
            if is_leaf(module):
                handles.append(module.register_forward_pre_hook(enter_leaf, with_kwargs=True))
                handles.append(module.register_forward_hook(leave_leaf(path)))
            elif module is not model:
                handles.append(module.register_forward_pre_hook(enter_scope(path)))
                handles.append(module.register_forward_hook(leave_scope))
        model.eval()
        with torch.no_grad(), _without_fast_path():
            for value in _tensors(inputs):
                recorder.add(Node(recorder.names("/input"), "input", "input"), value)
            with recorder:
                # forward itself where the model is made of modules: the model's own hooks are none of its graph
                output = model(*inputs) if is_leaf(model) else model.forward(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    # Producers are looked up with the mode off, so nothing is added but constants that are returned as they are.
    recorder.nodes.append(_connect(Node("/output", "output", "output", args=(_replace(output, recorder.known),))))
    return ModelGraph(recorder.nodes)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in _flat(list(values)) if isinstance(value, Tensor)]

"""What kind of call a node is, and what it does to signs: the tables behind `ap.graph`.  [ours]"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ap.activations.ranges import FUNCTIONAL, is_activation

if TYPE_CHECKING:
    from ap.graph import Node


class Traits(NamedTuple):
    """nonnegative: every output is ≥ 0. rectifier: and exactly 0 on a half-line."""

    nonnegative: bool
    rectifier: bool


_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
_MODULE_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (_LAYERS, "layer"),
    ((nn.Flatten, nn.Unflatten), "flatten"),
    ((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold), "reshape"),
    ((nn.Identity,), "identity"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((nn.Softmax, nn.Softmax2d, nn.Softmin), "softmax"),
)
# By part of the class name, so that other libraries' norms and stochastic depths are known too.
_NAMED_KINDS = (
    (("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "ResponseNorm"), "norm"),
    (("Dropout", "StochasticDepth", "DropPath"), "dropout"),
    (("Pool", "Pad", "Upsample", "Upsampling"), "pool"),
)
_FUNCTION_KINDS = {
    name: kind
    for kind, names in {
        "add": "add iadd",
        "sub": "sub isub rsub neg subtract",
        "mul": "mul imul multiply div truediv itruediv true_divide divide",
        "concat": "cat concat concatenate stack hstack vstack dstack",
        "flatten": "flatten view reshape unflatten view_as reshape_as",
        "reshape": "permute transpose swapaxes swapdims squeeze unsqueeze expand expand_as movedim t T mT H mH repeat "
        "tile roll flip channel_shuffle pixel_shuffle pixel_unshuffle unfold broadcast_to",
        "slice": "getitem chunk split unbind select narrow index_select gather tensor_split take_along_dim",
        "identity": "contiguous clone detach to float half bfloat16 double type type_as cpu cuda data",
        "dropout": "dropout dropout1d dropout2d dropout3d feature_dropout stochastic_depth",
        "pool": "mean sum amax amin max min interpolate pad constant_pad_nd upsample logsumexp",
        "norm": "batch_norm layer_norm group_norm instance_norm rms_norm normalize local_response_norm",
        "layer": "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear",
        "matmul": "matmul bmm mm mv einsum addmm baddbmm tensordot scaled_dot_product_attention",
        "embedding": "embedding embedding_bag one_hot",
        "softmax": "softmax softmin",
        "meta": "shape size dim ndim ndimension numel nelement getattr device dtype is_cuda is_nested requires_grad "
        "requires_grad_ layout stride len is_floating_point _assert is_contiguous element_size",
    }.items()
    for name in names.split()
}
_SIGN_KEEPING = ("pool", "dropout", "flatten", "reshape", "slice", "concat", "identity", "add", "mul", "matmul")
_ALWAYS_NONNEGATIVE = ("exp", "square", "abs", "absolute", "sqrt")

# Method name → short name: torch.fx knows a method only by its name.
_ACTIVATION_METHODS = {
    function.__name__: short
    for function, short in FUNCTIONAL.items()
    if getattr(Tensor, getattr(function, "__name__", ""), None) is function
}


def module_kind(module: nn.Module) -> str:
    """The kind of a call of this module."""
    if is_activation(module):
        return "activation"
    for classes, kind in _MODULE_KINDS:
        if isinstance(module, classes):
            return kind
    name = type(module).__name__
    return next((kind for parts, kind in _NAMED_KINDS if any(part in name for part in parts)), "other")


def function_kind(function: Callable[..., Any] | str) -> tuple[str, str]:
    """The kind and short name of a call of this function, or of the tensor method of this name."""
    if isinstance(function, str):
        if function in _ACTIVATION_METHODS:
            return "activation", _ACTIVATION_METHODS[function]
        name = function
    else:
        if function in FUNCTIONAL:
            return "activation", FUNCTIONAL[function]
        name = getattr(function, "__name__", str(function))
        if name == "__get__":  # a property such as .T or .shape: its name is on the descriptor
            name = getattr(getattr(function, "__self__", None), "__name__", name)
    short = name.strip("_") or name
    if "pool" in short:
        return "pool", short
    kind = _FUNCTION_KINDS.get(short) or _FUNCTION_KINDS.get(short.removeprefix("r").removeprefix("i"), "other")
    return kind, short


def activation_traits(node: Node) -> Traits:
    """Whether this activation's outputs are all ≥ 0, and whether it is a rectifier: looked up by evaluating it."""
    # Down to -60: far enough that a tail such as the sigmoid's stays above 0, which a rectifier's does not.
    grid = torch.cat([torch.linspace(-60, -20, 41), torch.linspace(-20, 20, 4001), torch.linspace(20, 1000, 50)])
    grid = grid.to(torch.float64)
    try:
        with torch.no_grad():
            output = _evaluate(node, grid)
    except (TypeError, ValueError, RuntimeError):  # its other arguments are not plain numbers: nothing can be said
        return Traits(False, False)
    if output is None or not bool(torch.isfinite(output).all()):
        return Traits(False, False)
    nonnegative = bool((output >= 0).all())
    return Traits(nonnegative, nonnegative and bool((output[0] == 0).all()))


def _evaluate(node: Node, grid: Tensor) -> Tensor | None:
    module = node.module
    if module is None:
        rest = node.args[1:]
        if any(isinstance(value, (Tensor, nn.Parameter)) or hasattr(value, "users") for value in rest):
            return None
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("input", "inplace", "out")}
        function = getattr(Tensor, node.function) if isinstance(node.function, str) else node.function
        return function(grid.clone(), *rest, **kwargs)
    if isinstance(module, nn.RReLU):  # its slopes are drawn anew in every pass
        return None
    parameter = next(module.parameters(), None)
    if parameter is None:
        return module.forward(grid.clone())
    width = max(parameter.numel() for parameter in module.parameters())
    values = grid.to(parameter.device, parameter.dtype)[:, None].expand(-1, width).contiguous()  # [grid, channels]
    return module.forward(values)


def preserves_sign(node: Node) -> bool:
    """Whether inputs ≥ 0 give outputs ≥ 0."""
    if node.kind == "other":
        return node.op in _ALWAYS_NONNEGATIVE
    if node.kind not in _SIGN_KEEPING or not node.inputs:
        return False
    if "Alpha" in node.op or "alpha" in node.op:  # these dropouts fill in negative values
        return False
    if node.kind == "pool":
        mode = node.kwargs.get("mode", getattr(node.module, "mode", None))
        value = node.kwargs.get("value", node.args[3] if node.op == "pad" and len(node.args) > 3 else 0)
        value = getattr(node.module, "value", value)
        return mode != "bicubic" and not (isinstance(value, (int, float)) and value < 0) and node.op != "logsumexp"
    if node.kind in ("add", "mul"):
        return not any(isinstance(value, (int, float)) and value < 0 for value in (*node.args, *node.kwargs.values()))
    return True

"""Gains and initialisation for any activation, so that signals keep their variance through depth.

With weights of variance gain²/fan a layer keeps the mean square of its input's pre-activations, where
gain = √(q / E[f(√q·z)²]), z standard normal and q the variance to keep (He et al. 2015 for rectifiers, where q does not
matter). `torch.nn.init.calculate_gain` knows few activations, and disagrees on SELU and tanh.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ap.activations.ranges import is_activation
from ap.activations.registry import create
from ap.names import named_modules

Activation = str | nn.Module | Callable[[Tensor], Tensor]
_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear  # of attention, which keeps what it has
_RECTIFIERS = {"relu": 0.0, "helu": 0.0}


def gain(activation: Activation, variance: float = 1.0, **parameters: Any) -> float:
    """√(q / E[f(√q·z)²]): weights of variance gain²/fan keep pre-activations at variance q.

    Closed forms where they are known (ReLU, HeLU, LeakyReLU, PReLU), else quadrature, good to 1e-6.

    Args:
        activation: a name, a module, or a function of a tensor.
        variance: q > 0; matters only for activations that are not homogeneous.
        parameters: of a named activation.

    Raises:
        ValueError: an unknown name, a variance that is not positive, or an activation whose output is always 0.

    Example:
        >>> round(gain("relu"), 5), round(gain("smelu", beta=1.0), 5), round(gain("gelu"), 5)
        (1.41421, 1.38034, 1.53353)
    """
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"variance must be positive, not {variance}")
    slope = _slope(activation, parameters)
    if slope is not None:
        return math.sqrt(2 / (1 + slope * slope))
    second = mean_square(_function(activation, parameters), variance)
    if not second > 0 or not math.isfinite(second):
        raise ValueError(f"E[f²] is {second}: no gain keeps the variance of this activation")
    return math.sqrt(variance / second)


def mean_square(f: Callable[[Tensor], Tensor], variance: float = 1.0) -> float:
    """E[f(√q·z)²] for a standard normal z, in double precision.

    >>> round(mean_square(torch.relu), 6)
    0.5
    """
    nodes, weights = _quadrature()
    with torch.no_grad():
        values = f(nodes * math.sqrt(variance)).double()
    return float((weights * values * values).sum())


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on 4,800 panels of [−12, 12], with the normal density: kinks fall into tiny panels, or between."""
    x, w = np.polynomial.legendre.leggauss(5)
    edges = np.linspace(-12, 12, 4801)
    half = (edges[1:] - edges[:-1]) / 2
    nodes = ((edges[1:] + edges[:-1]) / 2)[:, None] + half[:, None] * x
    density = np.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(nodes.ravel()), torch.from_numpy((half[:, None] * w * density).ravel())


def stability_exponent(activation: Activation, variance: float = 1.0, **parameters: Any) -> float:
    """d log q′ / d log q at the variance q that the right gain keeps: how a small error in q grows, layer by layer.

    At most 1, errors do not grow (ReLU: exactly 1). Above 1 they do, and the signal of a deep plain network explodes or
    dies however well it was initialised: normalise it.

    Example:
        >>> round(stability_exponent("relu"), 4), stability_exponent("tanh") < 1 < stability_exponent("gelu")
        (1.0, True)
    """
    f = _function(activation, parameters)
    step = 1e-3
    up, down = (mean_square(f, variance * math.exp(sign * step)) for sign in (1, -1))
    return (math.log(up) - math.log(down)) / (2 * step)


def initialize_(
    model: nn.Module,
    activation: Activation | None = None,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    variance: float = 1.0,
    distribution: Literal["normal", "uniform"] = "normal",
    generator: torch.Generator | None = None,
    example_input: Any = None,
    **parameters: Any,
) -> dict[str, float]:
    """Initialises every convolution and linear layer for the activation that its output feeds; biases become 0.

    Which activation that is comes from the model's real graph, through normalisation, pooling, dropout and additions.
    Layers that feed none (a classifier, a projection into a residual stream) get gain 1. Normalisation layers go to
    weight 1 and bias 0. In a residual network the branches' variances add up: with BatchNorm the first forward pass in
    training mode takes care of that, without it scale the last layer of each branch down yourself.

    Args:
        model: any module; attention and embeddings keep what they have.
        activation: used for every layer that feeds an activation, instead of the one found.
        mode: keep the variance of the forward pass ("fan_in") or of the gradients ("fan_out").
        variance: q, see `gain`.
        distribution: of the weights.
        generator: of the draws.
        example_input: for models whose graph cannot be found without.
        parameters: of a named activation.

    Returns:
        The standard deviation given to each layer's weight, by layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 50), nn.PReLU(), nn.Linear(50, 10))
        >>> stds = initialize_(model, "prelu")
        >>> [round(std, 4) for std in stds.values()] == [round((2 / 1.0625 / 100) ** 0.5, 4), round(50 ** -0.5, 4)]
        True
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', not {mode!r}")
    if distribution not in ("normal", "uniform"):
        raise ValueError(f"distribution must be 'normal' or 'uniform', not {distribution!r}")
    given = None if activation is None else gain(activation, variance, **parameters)
    following = _following(model, example_input)
    stds = {}
    for name, module in named_modules(model):
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
            for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
                if parameter is not None:
                    nn.init.constant_(parameter, value)
        own = isinstance(module, (_ConvNd, nn.Linear)) and not isinstance(module, _PROJECTION)
        if not own:
            continue
        feeds = following.get(name)
        scale = 1.0 if feeds is None else given if given is not None else gain(feeds, variance)
        std = scale / math.sqrt(_fan(module, mode))
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        with torch.no_grad():
            # A generator of the CPU draws there, whatever device the weight is on.
            drawn = weight if generator is None else torch.empty_like(weight, device=generator.device)
            if distribution == "normal":
                drawn.normal_(0, std, generator=generator)
            else:
                drawn.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
            weight.copy_(drawn)
            if bias is not None:
                bias.zero_()
        stds[name] = std
    return stds


def signal_variance(
    activation: Activation, depth: int, weight_variance: float | None = None, variance: float = 1.0, **parameters: Any
) -> list[float]:
    """The variance of the pre-activations of each layer of a wide network, layer 0 having `variance`.

    Args:
        activation: see `gain`.
        depth: how many layers follow.
        weight_variance: fan × Var W; the gain's square if not given, and 1 shows what happens without a gain.
        variance: q of layer 0.

    Example:
        >>> signal_variance("relu", 30, weight_variance=1.0)[-1] == 2.0**-30
        True
    """
    f = _function(activation, parameters)
    scale = gain(activation, variance, **parameters) ** 2 if weight_variance is None else weight_variance
    slope = _slope(activation, parameters)
    found = [variance]
    for _ in range(depth):
        second = found[-1] * (1 + slope * slope) / 2 if slope is not None else mean_square(f, found[-1])
        found.append(scale * second)
    return found


def _slope(activation: Activation, parameters: dict[str, Any]) -> float | None:
    """The slope left of 0 of a rectifier with straight sides; None for others."""
    if isinstance(activation, str):
        if activation in _RECTIFIERS:
            return _RECTIFIERS[activation]
        if activation not in ("leaky_relu", "prelu"):
            return None
        activation = create(activation, **parameters)
    if isinstance(activation, nn.LeakyReLU):
        return float(activation.negative_slope)
    if isinstance(activation, nn.PReLU) and activation.weight.numel() == 1:
        return float(activation.weight.detach())
    return 0.0 if isinstance(activation, nn.ReLU) else None


def _function(activation: Activation, parameters: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str):
        activation = create(activation, **parameters)
    elif parameters:
        raise ValueError(f"parameters ({', '.join(parameters)}) go with a named activation")
    if isinstance(activation, nn.Module):
        module = activation
        sizes = {parameter.numel() for parameter in module.parameters()} - {1}
        training = module.training

        def run(z: Tensor) -> Tensor:
            module.eval()
            try:
                like = next(module.parameters(), z)
                if not sizes:
                    return module(z.to(like)).double().to(z.device)
                # Parameters per channel: the mean over channels, each seeing the same inputs.
                channels = max(sizes)
                table = z.to(like)[:, None].expand(-1, channels)
                return module(table).double().square().mean(1).sqrt().to(z.device)
            finally:
                module.train(training)

        return run
    return activation


def _fan(module: nn.Module, mode: str) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    field = weight[0, 0].numel()
    groups = int(getattr(module, "groups", 1))
    outputs, inputs = weight.shape[0], weight.shape[1]
    if isinstance(module, _ConvTransposeNd):
        outputs, inputs = inputs, outputs // groups
    else:
        outputs = outputs // groups
    return max(1, (inputs if mode == "fan_in" else outputs) * field)


def _following(model: nn.Module, example_input: Any) -> dict[str, Activation]:
    """For each layer the activation that its output feeds, a module or the name of a function."""
    from ap.graph import trace

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = trace(model, example_input)
    except Exception as error:  # a model's own code may raise anything when it is traced
        why = str(error).partition("\n")[0] or repr(error)
        raise ValueError(
            f"cannot find which activation follows each layer ({why}): give example_input=, or initialise the model's "
            "traceable parts one by one"
        ) from error
    found: dict[str, Activation] = {}
    for node in graph.layers():
        _, activation = graph.path_to_activation(node)
        if activation is None:
            continue
        if activation.module is not None and is_activation(activation.module):
            found[node.target] = activation.module
        else:
            found[node.target] = activation.op
    return found

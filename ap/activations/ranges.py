"""The pre-activations for which an activation neither passes nor learns: its dead range.

A unit is dead for an input when ``|f(z)| <= eps`` and ``|f'(z)| <= eps``, f' being the true derivative and not a
surrogate. Each activation states the closed interval [low, high] of such z. Piecewise activations are exactly 0 there
and use ``eps = 0``; GELU, SiLU, Mish, sigmoid and Softplus only approach 0: ``eps = 0.01`` if not told otherwise.

A module of your own is an activation as soon as it has an attribute, property or method ``dead_range``:
a pair (low, high), or None when it cannot die; a method may take ``eps``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTH_EPS = 0.01
"""The default eps of activations that approach 0 without reaching it."""


class DeadRange(NamedTuple):
    """The closed interval [low, high] of dead pre-activations.

    The ends are floats, or tensors of shape [C] when the activation's parameters are per channel. In such a tensor a
    channel that cannot die has the empty interval low = +inf, high = -inf.
    """

    low: float | Tensor
    high: float | Tensor


NEGATIVE = DeadRange(-math.inf, 0.0)

Rule = Callable[..., "DeadRange | None"]


class _Spec(NamedTuple):
    name: str
    parameters: tuple[str, ...]  # the module's attributes that the rule needs
    rule: Rule  # rule(eps, *parameters); eps None asks for the activation's own default


def check_eps(eps: float | None) -> None:
    """Raises ValueError unless eps is None or in [0, 1)."""
    if eps is not None and not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")


_unread: ContextVar[bool] = ContextVar("unread", default=False)


@contextmanager
def unread() -> Iterator[None]:
    """Inside, no range looks at the values of parameters on a device, for which the host would have to wait.

    Their ranges are tensors then, and where nothing can die the empty interval instead of None. An activation whose
    range is found numerically has to look all the same.
    """
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def per_channel(low: Tensor, high: Tensor, can_die: Tensor) -> DeadRange | None:
    """Ends of shape [C] with the empty interval where a channel cannot die; floats if shared, None if none can die."""
    if not _unread.get():
        if not bool(can_die.any()):
            return None
        if can_die.numel() == 1:
            return DeadRange(float(low), float(high))
    return DeadRange(torch.where(can_die, low, math.inf), torch.where(can_die, high, -math.inf))


# --- rules, one a family ---------------------------------------------------------------------------------------------


def rectifier(eps: float | None) -> DeadRange:
    """ReLU, ReLU6, HeLU: (-inf, 0] at any eps, because the slope jumps to 1 at 0."""
    return NEGATIVE


def cannot_die(eps: float | None) -> None:
    """No interval at any eps below 1."""
    return None


def leaky(eps: float | None, slope: float | Tensor) -> DeadRange | None:
    """max(0, z) + slope * min(0, z): (-inf, 0] if the slope is 0, [-eps/|slope|, 0] if it is at most eps, else none."""
    limit = eps or 0.0
    if isinstance(slope, Tensor):
        size = slope.detach().abs().float()
        # 0/0 would be NaN: a slope of exactly 0 is dead arbitrarily far to the left.
        low = torch.where(size == 0, -math.inf, -limit / size.clamp(min=torch.finfo(torch.float32).tiny))
        return per_channel(low, torch.zeros_like(size), size <= limit)
    steepness = abs(slope)
    if steepness > limit:
        return None
    return DeadRange(-limit / steepness if steepness else -math.inf, 0.0)


def random_leaky(eps: float | None, lower: float, upper: float) -> DeadRange | None:
    """RReLU: the steepest slope it may draw decides."""
    return leaky(eps, max(abs(lower), abs(upper)))


def clamp(eps: float | None, low: float, high: float) -> DeadRange | None:
    """Hardtanh: dead where it saturates at (nearly) 0, which [-1, 1] does not."""
    limit = eps or 0.0
    if abs(low) <= limit:
        return DeadRange(-math.inf, low)
    return DeadRange(high, math.inf) if abs(high) <= limit else None


def threshold(eps: float | None, theta: float, value: float) -> DeadRange | None:
    """z above theta, else the value: (-inf, theta] if the value is (nearly) 0."""
    return DeadRange(-math.inf, theta) if abs(value) <= (eps or 0.0) else None


def shrink(eps: float | None, lambd: float) -> DeadRange:
    """Hardshrink and Softshrink: [-lambda, lambda]."""
    return DeadRange(-lambd, lambd)


def hardswish(eps: float | None) -> DeadRange:
    """(-inf, -3]: just above, the slope is already -1/2."""
    return DeadRange(-math.inf, -3.0) if (eps or 0.0) < 0.5 else numeric("hardswish", eps or 0.0) or NEGATIVE


def hardsigmoid(eps: float | None) -> DeadRange:
    """(-inf, -3] while eps is below the slope 1/6."""
    return DeadRange(-math.inf, -3.0 if (eps or 0.0) < 1 / 6 else 6 * (eps or 0.0) - 3)


def squared(eps: float | None, scale: float | Tensor = 1.0) -> DeadRange:
    """scale * relu(z)^2, before any bias: z <= min(sqrt(eps/scale), eps/(2 scale)), 0 at the default eps = 0."""
    if not eps:
        return NEGATIVE
    if isinstance(scale, Tensor):
        ratio = eps / scale.detach().abs().float()
        high = torch.minimum(ratio.sqrt(), ratio / 2)
        return DeadRange(torch.full_like(high, -math.inf), high)
    quotient = eps / abs(scale) if scale else math.inf
    return DeadRange(-math.inf, min(math.sqrt(quotient), quotient / 2))


def _smooth(name: str, default: float) -> Rule:
    def rule(eps: float | None, *parameters: Any) -> DeadRange | None:
        return numeric(name, default if eps is None else eps, *parameters)

    return rule


# --- smooth activations: found numerically ---------------------------------------------------------------------------

_SMOOTH: dict[str, Callable[..., Tensor]] = {
    "hardswish": F.hardswish,
    "gelu": lambda z, approximate="none": F.gelu(z, approximate=approximate),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "softplus": lambda z, beta=1.0, cut=20.0: F.softplus(z, beta, cut),
    "elu": lambda z, alpha=1.0: F.elu(z, alpha),
    "celu": lambda z, alpha=1.0: F.celu(z, alpha),
    "selu": F.selu,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "gcu": lambda z: z * torch.cos(z),
    "swish": lambda z, beta=1.0: z * torch.sigmoid(beta * z),
}


@lru_cache(maxsize=1024)
def numeric(name: str, eps: float, *parameters: Any) -> DeadRange | None:
    """The dead range of a smooth activation in double precision: its left tail, else its right tail, else around 0."""
    return solve(lambda z: _SMOOTH[name](z, *parameters), eps)


def solve(f: Callable[[Tensor], Tensor], eps: float) -> DeadRange | None:
    """Finds where ``|f| <= eps`` and ``|f'| <= eps`` for a scalar function of a float64 tensor.

    Looks on a grid of [-8e4, 8e4] that is fine near 0 and bisects its edges; the first of left tail, right tail and
    interval around 0 that exists is returned. With eps = 0 there is none: a tail that underflows is not a dead one.
    """
    if eps <= 0:
        return None

    def holds(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = f(z)
            (slope,) = torch.autograd.grad(y.sum(), z)
        return (y.detach().abs() <= eps) & (slope.abs() <= eps)

    def edge(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            if middle in (inside, outside):
                break
            if bool(holds(torch.tensor([middle], dtype=torch.float64))):
                inside = middle
            else:
                outside = middle
        return inside

    grid = torch.sinh(torch.linspace(-12, 12, 24001, dtype=torch.float64))
    dead = holds(grid)
    alive = torch.nonzero(~dead).flatten()
    if len(alive) == 0:
        return DeadRange(-math.inf, math.inf)
    first, last, zero = int(alive[0]), int(alive[-1]), len(grid) // 2
    if first > 0:
        return DeadRange(-math.inf, edge(float(grid[first - 1]), float(grid[first])))
    if last < len(grid) - 1:
        return DeadRange(edge(float(grid[last + 1]), float(grid[last])), math.inf)
    if not dead[zero]:
        return None
    left, right = int(alive[alive < zero][-1]), int(alive[alive > zero][0])
    if right - left == 2:  # the single grid point 0: no width
        return None
    return DeadRange(edge(float(grid[left + 1]), float(grid[left])), edge(float(grid[right - 1]), float(grid[right])))


# --- torch.nn's modules ----------------------------------------------------------------------------------------------

MODULES: dict[type[nn.Module], _Spec] = {
    nn.ReLU: _Spec("relu", (), rectifier),
    nn.ReLU6: _Spec("relu6", (), rectifier),
    nn.LeakyReLU: _Spec("leaky_relu", ("negative_slope",), leaky),
    nn.PReLU: _Spec("prelu", ("weight",), leaky),
    nn.RReLU: _Spec("rrelu", ("lower", "upper"), random_leaky),
    nn.ELU: _Spec("elu", ("alpha",), _smooth("elu", 0.0)),
    nn.CELU: _Spec("celu", ("alpha",), _smooth("celu", 0.0)),
    nn.SELU: _Spec("selu", (), _smooth("selu", 0.0)),
    nn.GELU: _Spec("gelu", ("approximate",), _smooth("gelu", SMOOTH_EPS)),
    nn.SiLU: _Spec("silu", (), _smooth("silu", SMOOTH_EPS)),
    nn.Mish: _Spec("mish", (), _smooth("mish", SMOOTH_EPS)),
    nn.Sigmoid: _Spec("sigmoid", (), _smooth("sigmoid", SMOOTH_EPS)),
    nn.Softplus: _Spec("softplus", ("beta", "threshold"), _smooth("softplus", SMOOTH_EPS)),
    nn.Hardswish: _Spec("hardswish", (), hardswish),
    nn.Hardsigmoid: _Spec("hardsigmoid", (), hardsigmoid),
    nn.Hardtanh: _Spec("hardtanh", ("min_val", "max_val"), clamp),
    nn.Threshold: _Spec("threshold", ("threshold", "value"), threshold),
    nn.Hardshrink: _Spec("hardshrink", ("lambd",), shrink),
    nn.Softshrink: _Spec("softshrink", ("lambd",), shrink),
    nn.Tanhshrink: _Spec("tanhshrink", (), _smooth("tanhshrink", 0.0)),
    nn.Tanh: _Spec("tanh", (), _smooth("tanh", 0.0)),
    nn.Softsign: _Spec("softsign", (), _smooth("softsign", 0.0)),
    nn.LogSigmoid: _Spec("logsigmoid", (), _smooth("logsigmoid", 0.0)),
}

# Activation classes of other libraries, by the top package and name of the class, so that nothing need be imported.
FOREIGN: dict[tuple[str, str], tuple[str, tuple[Any, ...], Rule]] = {
    (package, kind): (name, parameters, rule)
    for package, kinds in {
        "timm": {
            "GELU": ("gelu", ("none",), _smooth("gelu", SMOOTH_EPS)),
            "GELUTanh": ("gelu", ("tanh",), _smooth("gelu", SMOOTH_EPS)),
            "QuickGELU": ("swish", (1.702,), _smooth("swish", SMOOTH_EPS)),
            "Swish": ("silu", (), _smooth("silu", SMOOTH_EPS)),
            "SwishMe": ("silu", (), _smooth("silu", SMOOTH_EPS)),
            "Mish": ("mish", (), _smooth("mish", SMOOTH_EPS)),
            "MishMe": ("mish", (), _smooth("mish", SMOOTH_EPS)),
            "HardSwish": ("hardswish", (), hardswish),
            "HardSwishMe": ("hardswish", (), hardswish),
            "HardSigmoid": ("hardsigmoid", (), hardsigmoid),
            "HardSigmoidMe": ("hardsigmoid", (), hardsigmoid),
            "Sigmoid": ("sigmoid", (), _smooth("sigmoid", SMOOTH_EPS)),
            "Tanh": ("tanh", (), _smooth("tanh", 0.0)),
        },
        "transformers": {
            "GELUActivation": ("gelu", ("none",), _smooth("gelu", SMOOTH_EPS)),
            "NewGELUActivation": ("gelu", ("tanh",), _smooth("gelu", SMOOTH_EPS)),
            "FastGELUActivation": ("gelu", ("tanh",), _smooth("gelu", SMOOTH_EPS)),
            "GELUTanh": ("gelu", ("tanh",), _smooth("gelu", SMOOTH_EPS)),
            "PytorchGELUTanh": ("gelu", ("tanh",), _smooth("gelu", SMOOTH_EPS)),
            "QuickGELUActivation": ("swish", (1.702,), _smooth("swish", SMOOTH_EPS)),
            "SiLUActivation": ("silu", (), _smooth("silu", SMOOTH_EPS)),
            "MishActivation": ("mish", (), _smooth("mish", SMOOTH_EPS)),
            "ReLUSquaredActivation": ("relu_squared", (), squared),
        },
    }.items()
    for kind, (name, parameters, rule) in kinds.items()
}

# Classes that the user declared to be activations; a rule of None means that they cannot die.
REGISTERED: dict[type[nn.Module], Callable[[nn.Module, float | None], DeadRange | None]] = {}


def _spec(module: nn.Module) -> _Spec | None:
    return next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)


def _foreign(module: nn.Module) -> tuple[str, tuple[Any, ...], Rule] | None:
    kind = type(module)
    return FOREIGN.get((kind.__module__.partition(".")[0], kind.__name__))


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an element-wise activation: torch.nn's, this package's, or one that has a ``dead_range``.

    GLU and softmax are not element-wise and do not count.

    >>> is_activation(nn.GELU()), is_activation(nn.Linear(2, 2)), is_activation(nn.Softmax(1))
    (True, False, False)
    """
    return (
        hasattr(type(module), "dead_range")
        or "dead_range" in vars(module)
        or type(module) in REGISTERED
        or _spec(module) is not None
        or _foreign(module) is not None
    )


def dead_range(module: nn.Module, eps: float | None = None) -> DeadRange | None:
    """The closed interval of pre-activations where the module neither passes nor learns; None if it cannot die.

    Args:
        eps: both ``|f|`` and ``|f'|`` are at most this; None takes the activation's own default, 0 or 0.01.

    Raises:
        TypeError: the module is not an activation.
        ValueError: eps is outside [0, 1).

    >>> dead_range(nn.ReLU())
    DeadRange(low=-inf, high=0.0)
    >>> round(dead_range(nn.SiLU()).high, 3), dead_range(nn.Tanh())
    (-6.471, None)
    """
    check_eps(eps)
    if hasattr(type(module), "dead_range") or "dead_range" in vars(module):
        return _declared(module, "dead_range", eps)
    if type(module) in REGISTERED:
        return REGISTERED[type(module)](module, eps)
    if (spec := _spec(module)) is not None:
        return spec.rule(eps, *(getattr(module, name) for name in spec.parameters))
    if (foreign := _foreign(module)) is not None:
        _, parameters, rule = foreign
        return rule(eps, *parameters)
    raise TypeError(
        f"{type(module).__name__} is not known as an activation: give it a `dead_range` (low, high), "
        "or None if it cannot die, or register its class with ap.activations.register"
    )


def gradient_dead_range(module: nn.Module, eps: float | None = None) -> DeadRange | None:
    """The interval where no gradient comes back. It differs from `dead_range` only for surrogate gradients (HeLU)."""
    check_eps(eps)
    if hasattr(type(module), "gradient_dead_range") or "gradient_dead_range" in vars(module):
        return _declared(module, "gradient_dead_range", eps)
    return dead_range(module, eps)


def _declared(module: nn.Module, attribute: str, eps: float | None) -> DeadRange | None:
    at = getattr(module, f"{attribute}_at", None)  # this package's own modules: the property is the default eps
    if callable(at):
        value = at(eps)
    else:
        value = getattr(module, attribute)
        if callable(value):
            value = value(eps) if inspect.signature(value).parameters else value()
    if value is None:
        return None
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(
            f"{type(module).__name__}.{attribute} must be a pair (low, high), or None if it cannot die; got {value!r}"
        )
    return DeadRange(*(end if isinstance(end, Tensor) else float(end) for end in value))


# --- functional calls ------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    name: str
    defaults: dict[str, Any]  # arguments after the input, in order
    rule: Rule  # rule(eps, *parameters) with the arguments in `uses`
    uses: tuple[str, ...] = ()


def _calls() -> dict[Callable[..., Any], _Call]:
    """Every spelling of a functional activation in torch."""
    smooth = SMOOTH_EPS
    one = {
        "relu": ((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_), rectifier),
        "relu6": ((F.relu6,), rectifier),
        "selu": ((F.selu, F.selu_, torch.selu, torch.selu_), _smooth("selu", 0.0)),
        "silu": ((F.silu,), _smooth("silu", smooth)),
        "mish": ((F.mish,), _smooth("mish", smooth)),
        "sigmoid": (
            (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid),
            _smooth("sigmoid", smooth),
        ),
        "tanh": ((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh), _smooth("tanh", 0.0)),
        "hardswish": ((F.hardswish,), hardswish),
        "hardsigmoid": ((F.hardsigmoid,), hardsigmoid),
        "tanhshrink": ((F.tanhshrink,), _smooth("tanhshrink", 0.0)),
        "softsign": ((F.softsign,), _smooth("softsign", 0.0)),
        "logsigmoid": ((F.logsigmoid,), _smooth("logsigmoid", 0.0)),
    }
    table = {func: _Call(name, {}, rule) for name, (functions, rule) in one.items() for func in functions}
    more: list[tuple[tuple[Callable[..., Any], ...], _Call]] = [
        ((F.gelu,), _Call("gelu", {"approximate": "none"}, _smooth("gelu", smooth), ("approximate",))),
        (
            (F.leaky_relu, F.leaky_relu_),
            _Call("leaky_relu", {"negative_slope": 0.01}, leaky, ("negative_slope",)),
        ),
        ((F.prelu, torch.prelu, Tensor.prelu), _Call("prelu", {"weight": 0.25}, leaky, ("weight",))),
        (
            (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_),
            _Call("rrelu", {"lower": 1 / 8, "upper": 1 / 3}, random_leaky, ("lower", "upper")),
        ),
        ((F.elu, F.elu_), _Call("elu", {"alpha": 1.0}, _smooth("elu", 0.0), ("alpha",))),
        ((F.celu, F.celu_, torch.celu, torch.celu_), _Call("celu", {"alpha": 1.0}, _smooth("celu", 0.0), ("alpha",))),
        (
            (F.hardtanh, F.hardtanh_),
            _Call("hardtanh", {"min_val": -1.0, "max_val": 1.0}, clamp, ("min_val", "max_val")),
        ),
        (
            (F.threshold, torch.threshold, torch.threshold_),
            _Call("threshold", {"threshold": 0.0, "value": 0.0}, threshold, ("threshold", "value")),
        ),
        ((F.hardshrink, torch.hardshrink, Tensor.hardshrink), _Call("hardshrink", {"lambd": 0.5}, shrink, ("lambd",))),
        ((F.softshrink,), _Call("softshrink", {"lambd": 0.5}, shrink, ("lambd",))),
        (
            (F.softplus,),
            _Call("softplus", {"beta": 1.0, "threshold": 20.0}, _smooth("softplus", smooth), ("beta", "threshold")),
        ),
    ]
    table |= {func: call for functions, call in more for func in functions}
    return table


_CALLS = _calls()

FUNCTIONAL: Mapping[Callable[..., Any], str] = {func: call.name for func, call in _CALLS.items()}
"""Functional activation calls and their short names."""


def call_dead_range(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], eps: float | None = None
) -> DeadRange | None:
    """The dead range of a functional call, from the arguments it was called with (the input first).

    >>> call_dead_range(F.leaky_relu, (torch.zeros(2), 0.0), {})
    DeadRange(low=-inf, high=0.0)

    Raises:
        TypeError: the function is not in `FUNCTIONAL`.
    """
    check_eps(eps)
    if func not in _CALLS:
        raise TypeError(f"{getattr(func, '__name__', func)} is not known as a functional activation")
    call = _CALLS[func]
    given = dict(zip(call.defaults, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in call.defaults}
    values = call.defaults | given
    return call.rule(eps, *(values[name] for name in call.uses))

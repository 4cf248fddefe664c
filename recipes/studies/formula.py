"""Activations given as formulas: parsed by a small grammar, never by `eval`."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ap.activations

EPS = 1e-3
MAX_LENGTH, MAX_NODES = 2000, 300
Env = Mapping[str, Any]
Compiled = Callable[[Env], Any]


def _divide(a: Any, b: Any) -> Any:
    """a / b with |b| ≥ ε, so that no pole is met."""
    b = torch.as_tensor(b)
    return a / torch.where(b.abs() < EPS, torch.where(b < 0, -EPS, EPS), b)


def _extreme(choose: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def of(a: Any, b: Any) -> Any:
        like = a if isinstance(a, Tensor) else b
        if not isinstance(like, Tensor):
            return choose(torch.as_tensor(float(a)), torch.as_tensor(float(b)))
        return choose(torch.as_tensor(a).to(like), torch.as_tensor(b).to(like))

    return of


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda x: function(x if isinstance(x, Tensor) else torch.as_tensor(float(x)))


FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "abs": (1, _unary(torch.abs)),
    "sqrt": (1, _unary(lambda x: x.clamp(min=1e-6).sqrt())),  # 0 and below have the root of 1e-6 and no slope
    "log_abs": (1, _unary(lambda x: (x.abs() + EPS).log())),
    "exp": (1, _unary(torch.exp)),
    "sin": (1, _unary(torch.sin)),
    "cos": (1, _unary(torch.cos)),
    "sinh": (1, _unary(torch.sinh)),
    "cosh": (1, _unary(torch.cosh)),
    "tanh": (1, _unary(torch.tanh)),
    "asinh": (1, _unary(torch.asinh)),
    "atan": (1, _unary(torch.atan)),
    "sinc": (1, _unary(lambda x: torch.sinc(x / torch.pi))),  # sin(x) / x, 1 at 0
    "sigmoid": (1, _unary(torch.sigmoid)),
    "softplus": (1, _unary(nn.functional.softplus)),
    "erf": (1, _unary(torch.erf)),
    "max": (2, _extreme(torch.maximum)),
    "min": (2, _extreme(torch.minimum)),
}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: _divide,
}


def compile_formula(text: str) -> tuple[Compiled, list[str]]:
    """A function of the named values, and the names that the formula uses.

    Numbers, names, + − * /, whole powers from 2 to 9 and the functions in `FUNCTIONS`; a division keeps its divisor
    at least ε = 0.001 away from zero.

    >>> f, names = compile_formula("x * sigmoid(b0 * x)")
    >>> names, f({"x": torch.tensor(0.0), "b0": 1.0}).item()
    (['x', 'b0'], 0.0)

    Raises:
        ValueError: anything else in the formula, which is named.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a formula has at most {MAX_LENGTH} characters, not {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"formula {text!r} cannot be read: {error}") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ValueError(f"formula {text[:60]!r}… has more than {MAX_NODES} parts")
    names: dict[str, None] = {}
    return _compile(tree.body, text, names), list(names)


def _compile(node: ast.expr, text: str, names: dict[str, None]) -> Compiled:
    def wrong(what: str) -> ValueError:
        allowed = ", ".join(FUNCTIONS)
        return ValueError(f"formula {text!r}: {what}; numbers, names, + - * / ** and {allowed} are allowed")

    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise wrong(f"{node.value!r} is not a number")
        value = float(node.value)
        return lambda env: value
    if isinstance(node, ast.Name):
        name = node.id
        if name in FUNCTIONS:
            raise wrong(f"{name} is a function, and has no argument here")
        names[name] = None
        return lambda env: env[name]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _compile(node.operand, text, names)
        return lambda env: -operand(env)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right
        if not (isinstance(power, ast.Constant) and type(power.value) is int and 2 <= power.value <= 9):
            raise wrong("a power is a whole number from 2 to 9")
        base, exponent = _compile(node.left, text, names), power.value
        return lambda env: base(env) ** exponent
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        apply = OPERATORS[type(node.op)]
        left, right = _compile(node.left, text, names), _compile(node.right, text, names)
        return lambda env: apply(left(env), right(env))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in FUNCTIONS:
            close = difflib.get_close_matches(node.func.id, FUNCTIONS, n=3, cutoff=0.5)
            raise wrong(
                f"unknown function {node.func.id!r}" + (f" (did you mean {', '.join(close)}?)" if close else "")
            )
        arity, function = FUNCTIONS[node.func.id]
        if len(node.args) != arity:
            raise wrong(f"{node.func.id} takes {arity} argument{'s' * (arity > 1)}, not {len(node.args)}")
        arguments = [_compile(argument, text, names) for argument in node.args]
        return lambda env: function(*(argument(env) for argument in arguments))
    raise wrong(f"{ast.unparse(node)!r} is not allowed")


class Formula(nn.Module):
    """The activation that a formula of x describes; its other names are learnable numbers that start at `start`.

    >>> swish = Formula("x * sigmoid(b0 * x)")
    >>> swish(torch.tensor([0.0, 1.0])).detach()
    tensor([0.0000, 0.7311])

    Raises:
        ValueError: a formula that is not allowed, or one without x.
    """

    def __init__(self, expression: str = "x * sigmoid(x)", start: float = 1.0) -> None:
        super().__init__()
        self.expression = expression
        self._function, names = compile_formula(expression)
        if "x" not in names:
            raise ValueError(f"formula {expression!r} does not depend on x")
        self._learnable = [name for name in names if name != "x"]
        for name in self._learnable:
            if hasattr(self, name):
                raise ValueError(f"formula {expression!r}: {name!r} cannot be a parameter's name; b0, b1, … can")
            self.register_parameter(name, nn.Parameter(torch.tensor(float(start))))

    def forward(self, x: Tensor) -> Tensor:
        env = {name: getattr(self, name).to(x.dtype) for name in self._learnable}
        return self._function({"x": x, **env})

    def extra_repr(self) -> str:
        return self.expression


def left_tail(module: nn.Module, eps: float | None = None) -> tuple[float, float] | None:
    """The left tail on which the formula neither passes nor learns: |f| and |f′| at most ε (0.01 if not given).

    Looked at on a grid of 0.001 down to −30, and at −100 and −1000; None where there is no such tail.

    >>> left_tail(Formula("max(x, 0)"))
    (-inf, 0.0)
    """
    eps = 0.01 if eps is None else eps
    grid = torch.cat([torch.tensor([-1000.0, -100.0]), torch.arange(-30000, 30001) / 1000]).double().requires_grad_()
    with torch.enable_grad():
        value = module(grid)
        (slope,) = torch.autograd.grad(value.sum(), grid)
    # At a corner, such as 0 for max(x, 0), the tail's slope is the one to its left.
    dead = (value.abs() <= eps) & ((slope.abs() <= eps) | (slope.roll(1).abs() <= eps))
    if not bool(dead[:3].all()):
        return None
    return float("-inf"), float(grid.detach()[int(dead.cumprod(0).sum()) - 1])


if "formula" not in ap.activations.names():
    ap.activations.register("formula", Formula, dead_range=left_tail)

"""The grammar of activations (Ramachandran et al. 2017): core units b(u1, u2), alone or in a chain."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.studies.formula import compile_formula

# u is the input, b a learnable number. Templates are the one definition: of what is computed and what is printed.
UNARY = (
    "u", "-u", "abs(u)", "u**2", "u**3", "sqrt(u)", "b * u", "u + b", "log_abs(u)", "exp(u)", "sin(u)", "cos(u)",
    "sinh(u)", "cosh(u)", "tanh(u)", "asinh(u)", "atan(u)", "sinc(u)", "max(u, 0)", "min(u, 0)", "sigmoid(u)",
    "softplus(u)", "exp(-u**2)", "erf(u)", "b",
)  # fmt: skip
BINARY = (
    "u + v", "u * v", "u - v", "u / v", "max(u, v)", "min(u, v)", "sigmoid(u) * v", "exp(-b * (u - v)**2)",
    "exp(-b * abs(u - v))", "b * u + (1 - b) * v",
)  # fmt: skip
_UNARY = [compile_formula(text) for text in UNARY]
_BINARY = [compile_formula(text) for text in BINARY]


@dataclass(frozen=True)
class Unit:
    """b(u1(v), u2(w)): v is what the unit before gave, w is x (source 0) or what any earlier unit gave."""

    first: int
    second: int
    binary: int
    source: int = 0


Candidate = tuple[Unit, ...]


def core_units() -> Iterator[Candidate]:
    """All candidates of one core unit: 25 × 25 × 10.

    >>> sum(1 for _ in core_units())
    6250
    """
    for first, second, binary in itertools.product(range(len(UNARY)), range(len(UNARY)), range(len(BINARY))):
        yield (Unit(first, second, binary),)


def to_formula(candidate: Candidate) -> str:
    """The candidate as a formula of x and learnable b0, b1, …

    >>> to_formula((Unit(UNARY.index("b * u"), UNARY.index("u"), BINARY.index("sigmoid(u) * v")),))
    'sigmoid(b0 * x) * x'
    """
    values, count = ["x"], itertools.count()
    for unit in candidate:
        first = _fill(UNARY[unit.first], values[-1], "", count)
        second = _fill(UNARY[unit.second], values[unit.source], "", count)
        values.append(_fill(BINARY[unit.binary], first, second, count))
    return ast.unparse(ast.parse(values[-1], mode="eval"))  # without the brackets that are not needed


def _fill(template: str, u: str, v: str, count: Iterator[int]) -> str:
    def group(text: str) -> str:
        return text if text.isidentifier() else f"({text})"

    name = f"b{next(count)}" if "b" in _tokens(template) else ""
    if template == "u":
        return u
    parts = {"u": group(u), "v": group(v), "b": name}
    return "".join(parts.get(token, token) for token in _tokens(template))


def _tokens(template: str) -> list[str]:
    """Names and everything between them."""
    return ["".join(run) for _, run in itertools.groupby(template, key=lambda c: c.isalnum() or c == "_")]


class Grouped:
    """The activations of T candidates at once: each function of the grammar runs once, on all that use it."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        lengths = {len(candidate) for candidate in candidates}
        if len(lengths) != 1:
            raise ValueError("candidates of one group must be chains of the same length")
        self.units = lengths.pop()
        columns = [[[getattr(c[j], k) for c in candidates] for j in range(self.units)] for k in _FIELDS]
        self._first, self._second, self._binary, self._source = (
            [_Groups(torch.tensor(column)) for column in kind] for kind in columns
        )

    def __call__(self, x: Tensor, b: Tensor) -> Tensor:
        """Outputs [T, ...] for x [T, ...] and learnable numbers b [T, 3 · units]."""
        trailing = (1,) * (x.dim() - 1)
        values = [x]
        for j in range(self.units):
            numbers = [b[:, 3 * j + i].view(-1, *trailing) for i in range(3)]
            source = self._source[j].run(lambda k, rows: values[k][rows], x)
            u = self._first[j].run(_apply(_UNARY, values[-1], None, numbers[0]), x)
            v = self._second[j].run(_apply(_UNARY, source, None, numbers[1]), x)
            values.append(self._binary[j].run(_apply(_BINARY, u, v, numbers[2]), x))
        return values[-1]


_FIELDS = ("first", "second", "binary", "source")


def _apply(functions: list, u: Tensor, v: Tensor | None, b: Tensor) -> Callable[[int, Tensor], Tensor]:  # type: ignore[type-arg]
    def run(k: int, rows: Tensor) -> Tensor:
        env = {"u": u[rows], "b": b[rows]} | ({} if v is None else {"v": v[rows]})
        return functions[k][0](env)

    return run


class _Groups:
    """Which rows take which alternative, and the order that puts the results back."""

    def __init__(self, kinds: Tensor) -> None:
        self._rows = [(int(k), torch.nonzero(kinds == k).flatten()) for k in kinds.unique()]
        self._back = torch.cat([rows for _, rows in self._rows]).argsort()

    def run(self, function: Callable[[int, Tensor], Tensor], like: Tensor) -> Tensor:
        if self._rows[0][1].device != like.device:
            self._rows = [(k, rows.to(like.device)) for k, rows in self._rows]
            self._back = self._back.to(like.device)
        parts = [function(k, rows).expand(len(rows), *like.shape[1:]) for k, rows in self._rows]
        return torch.cat(parts)[self._back]


@dataclass(frozen=True)
class Sieve:
    """Which candidates are worth a training, and why the others are not, counted."""

    valid: list[int]
    rejected: dict[str, int]


def sieve(candidates: Sequence[Candidate], seen: set[bytes] | None = None) -> Sieve:
    """Rejects candidates that are not finite (in value or slope) or constant on [−5, 5], or equal to one seen before.

    Two are equal when they agree to three digits for two settings of their learnable numbers. `seen` is added to.
    """
    seen = set() if seen is None else seen
    x = torch.linspace(-5, 5, 101).expand(len(candidates), -1).clone().requires_grad_()
    group = Grouped(candidates)
    at = [group(x, torch.full((len(candidates), 3 * group.units), value)) for value in (1.0, 1.37)]
    (slope,) = torch.autograd.grad(at[0].sum(), x)
    finite = torch.isfinite(torch.stack([*at, slope])).all(0).all(1)
    varies = at[0].detach().std(dim=1) > 1e-3
    marks = torch.cat(at, dim=1).detach().double()
    scale = marks.abs().amax(1, keepdim=True).clamp(min=1e-3)
    rounded = ((marks / scale) * 1e3).round().add(0.0).to(torch.int16)  # + 0.0: no negative zeros
    valid, rejected = [], {"not finite": 0, "constant": 0, "duplicate": 0}
    for i in range(len(candidates)):
        mark = rounded[i].numpy().tobytes() + f"{scale[i].item():.3g}".encode()
        reason = None
        if not finite[i]:
            reason = "not finite"
        elif not varies[i]:
            reason = "constant"
        elif mark in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(mark)
            valid.append(i)
        else:
            rejected[reason] += 1
    return Sieve(valid, rejected)

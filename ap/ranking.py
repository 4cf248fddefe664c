"""The k lowest scores of many layers, exactly: one place for ranking, counting and ties.

Nothing here concatenates the scores. A global selection finds the k-th lowest value by narrowing a bracket around it:
a sample guesses the bracket, one pass counts what lies below and collects the little that lies inside. The guess only
decides how many passes it takes, never the result. Ties are broken by position: first by the order of the layers, then
by the row-major position within a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 18  # elements looked at in one go: what a pass needs in extra memory, little enough for a CPU's caches
ON_DEVICE = 16  # as many times that on a GPU, where each look costs a launch
SAMPLE = 1 << 16  # values the bracket is guessed from
NARROW = 8  # rows of at most that many elements are ranked by comparing every pair
COLLECT = 1 << 22  # values that may be taken out of the bracket (and sorted) at once


class LazyScores(Mapping[str, Tensor]):
    """Scores computed layer by layer, each time they are asked for, so that only one layer's are in memory.

    >>> scores = LazyScores(["a", "b"], lambda name: torch.full((2,), float(ord(name))))
    >>> scores["b"]
    tensor([98., 98.])
    """

    def __init__(self, names: Sequence[str], compute: Callable[[str], Tensor]) -> None:
        self._names = list(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping's own way would compute them

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Elementwise(LazyScores):
    """Lazy scores that look at one weight at a time, computed piece by piece: not even a whole layer's are in memory.

    Args:
        names: of the layers.
        tensors: what the scores of a layer are made of, tensors of the weight's shape.
        function: `function(name, *pieces)`, the scores of the same piece of each tensor, which it leaves as they are.

    >>> scores = Elementwise(["a"], lambda name: [torch.tensor([-2.0, 1.0])], lambda name, weight: weight.abs())
    >>> scores["a"]
    tensor([2., 1.])
    """

    def __init__(
        self,
        names: Sequence[str],
        tensors: Callable[[str], Sequence[Tensor]],
        function: Callable[..., Tensor],
    ) -> None:
        super().__init__(names, lambda name: function(name, *tensors(name)))
        self.tensors = tensors
        self.function = function


def count_true(mask: Tensor) -> int:
    """How many elements of a bool tensor are True. NumPy counts them five times as fast as torch does on a CPU.

    >>> count_true(torch.tensor([True, False, True]))
    2
    """
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else torch.count_nonzero(mask))


def apportion(total: int, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Splits `total` in proportion to `sizes` by largest remainder; the sum is exact, equal remainders go to the first.

    Args:
        total: how many to split, at most sum(sizes).
        sizes: what each part has, [n] integers ≥ 0.

    Returns:
        [n] int64, part i at most sizes[i].

    >>> apportion(5, [10, 10, 1]).tolist()
    [3, 2, 0]
    """
    parts = np.asarray(sizes, dtype=np.int64)
    whole = int(parts.sum())
    if not 0 <= total <= whole:
        raise ValueError(f"cannot split {total} over parts that hold {whole}")
    if total == 0:
        return np.zeros_like(parts)
    exact = parts.astype(object) if total * int(parts.max()) >= 2**63 else parts
    shares = (exact * total // whole).astype(np.int64)
    remainders = exact * total % whole
    order = np.argsort(-remainders, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def lowest(
    scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor], k: int, reuse: bool = False
) -> dict[str, Tensor]:
    """Selects exactly the `k` lowest scores over all layers together.

    Args:
        scores: a floating tensor a layer, of any shape, stride and dtype; read at most a few times each, one at a time.
        eligible: bool tensors of the same shapes: what may be selected. Its order is the order of ties.
        k: how many, between 0 and the number of eligible elements.
        reuse: the tensors of `eligible` are not needed any more: the result is written into them.

    Returns:
        bool tensors of the same shapes and names, True = selected.

    Raises:
        ValueError: a score of an eligible element is NaN (the layer is named), or k is out of range.

    >>> s = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    >>> lowest(s, {n: torch.ones(2, dtype=torch.bool) for n in s}, 1)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}
    """
    return dict(select_lowest(scores, eligible, k, reuse))


def select_lowest(
    scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor], k: int, reuse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """`lowest`, layer by layer: only one layer's selection is in memory. Errors come before the first one."""
    source = _Source(scores, eligible)
    size = sum(source.counts.values())
    if not 0 <= k <= size:
        raise ValueError(f"cannot select {k} of {size} elements")
    threshold = _kth_lowest(source, size, k) if k else _Threshold(-math.inf, 0, False)
    return ((name, chosen) for name, chosen in _pick(source, threshold, reuse))


class _Source:
    """Scores and what may be selected of them, as flat chunks in row-major order, again and again."""

    def __init__(self, scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor]) -> None:
        self.scores, self.eligible = scores, eligible
        self.counts = {name: count_true(mask) for name, mask in eligible.items()}
        self.names = [name for name in eligible if self.counts[name]]
        self._dtypes: dict[str, torch.dtype] = {}  # known after the first pass
        self._common: torch.dtype | None = None

    def layer(self, name: str, stride: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A layer's chunks; of each chunk every `stride`-th element."""
        mask = self.eligible[name]
        # A mask with every element set is not worth reading again and again.
        whole = self.counts[name] == mask.numel()
        for values, part in pieces(self.scores, name, mask, whole, stride):
            if self._common is None:
                if not values.dtype.is_floating_point:
                    raise TypeError(f"{name}: scores must be floating point, not {values.dtype}")
                self._dtypes[name] = values.dtype
            yield values if self._common is None else values.to(self._common), part

    def chunks(self, stride: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One pass. The first one, which compares with infinities only, finds the dtype that holds all scores."""
        for name in self.names:
            yield from self.layer(name, stride)
        if self._common is None:
            self._common = functools.reduce(torch.promote_types, self._dtypes.values())

    def first_nan(self) -> str | None:
        for name in self.names:
            if bool(torch.isnan(self.scores[name]).logical_and_(self.eligible[name]).any()):
                return name
        return None


def pieces(
    scores: Mapping[str, Tensor], name: str, mask: Tensor, whole: bool = False, stride: int = 1
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's scores and mask as flat chunks in row-major order; of each chunk every `stride`-th element.

    Args:
        scores: elementwise ones are computed for one chunk at a time.
        name: of the layer.
        mask: of the weight's shape.
        whole: leave the mask out, and give None instead.

    Raises:
        ValueError: scores of another shape than the mask's.
    """
    tensors = list(scores.tensors(name)) if isinstance(scores, Elementwise) else [scores[name]]
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].shape != mask.shape:
        raise ValueError(f"{name}: scores of shape {list(tensors[0].shape)} for weights of shape {list(mask.shape)}")
    for *chunks, part in _chunks(tensors if whole else [*tensors, mask], whole):
        if stride > 1:
            chunks = [chunk[::stride] for chunk in chunks]
            part = None if part is None else part[::stride]
        yield (scores.function(name, *chunks) if isinstance(scores, Elementwise) else chunks[0]), part


@dataclass(frozen=True)
class _Threshold:
    """What is below `value` goes, and of what equals it the first `ties`, which may be all of them."""

    value: float
    ties: int
    all_ties: bool


def _pick(source: _Source, threshold: _Threshold, reuse: bool) -> Iterator[tuple[str, Tensor]]:
    ties = threshold.ties
    for name, eligible in source.eligible.items():
        in_place = reuse and eligible.is_contiguous()
        chosen = eligible if in_place else eligible.clone(memory_format=torch.contiguous_format)
        flat, at = chosen.view(-1), 0
        for values, _ in source.layer(name) if source.counts[name] else ():
            part = flat[at : at + values.numel()]  # what may be chosen, until it is narrowed down
            at += values.numel()
            tied = None
            if ties and not threshold.all_ties:
                tied = (values == threshold.value).logical_and_(part)
                here = count_true(tied)
                if here > ties:
                    tied[tied.nonzero()[ties:, 0]] = False
                ties -= min(here, ties)
            _and(part, _less(values, threshold.value, or_equal=threshold.all_ties))
            if tied is not None:
                part |= tied
        yield name, chosen


def lowest_per_row(scores: Tensor, eligible: Tensor, quotas: Tensor) -> Tensor:
    """Selects the `quotas[r]` lowest eligible scores of every row r; ties go by position.

    Args:
        scores: [R, C], floating.
        eligible: [R, C], bool.
        quotas: [R], integers, at most the number of eligible elements of each row.

    Returns:
        [R, C], bool.

    >>> lowest_per_row(torch.tensor([[2.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([1]))
    tensor([[False,  True, False]])
    """
    if bool(torch.isnan(scores).logical_and_(eligible).any()):
        raise ValueError("scores contain NaN")
    chosen = torch.zeros_like(eligible)
    if not chosen.numel():
        return chosen
    rows = max(1, CHUNK // scores.shape[1])
    for start in range(0, scores.shape[0], rows):
        part = slice(start, start + rows)
        quota = quotas[part, None].to(scores.device)
        if scores.shape[1] <= NARROW:
            chosen[part] = _by_comparing(scores[part], eligible[part], quota)
            continue
        values = torch.where(eligible[part], scores[part], torch.inf)
        # Sorted values give each row's limit; NumPy sorts them several times faster than a CPU sort with indices.
        on_cpu = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=1)) if on_cpu else values.sort(1).values
        limit = ordered.gather(1, (quota - 1).clamp(min=0).long())
        below = values < limit
        equal = (values == limit) & eligible[part]
        missing = quota - below.sum(1, keepdim=True)
        surplus = (equal.sum(1, keepdim=True) > missing).nonzero()[:, 0]
        if surplus.numel():  # ties: the first ones go
            tied = equal[surplus]
            equal[surplus] = tied & (tied.cumsum(1) <= missing[surplus])
        chosen[part] = below | equal
    return chosen


def _by_comparing(scores: Tensor, eligible: Tensor, quota: Tensor) -> Tensor:
    """`lowest_per_row` of narrow rows: each element's rank is the number of those before it, pair by pair."""
    whole = bool(eligible.all())
    values = (scores if whole else torch.where(eligible, scores, torch.inf)).T.contiguous()  # [C, R]
    may = eligible.T
    ranks = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            later_first = values[j] < values[i]
            if not whole:  # an ineligible element never stands before an eligible +inf
                later_first |= may[j] & ~may[i]
            ranks[i] += later_first
            ranks[j] += ~later_first
    return (ranks < quota.T).T & eligible


def _chunks(tensors: Sequence[Tensor], whole: bool) -> Iterator[list[Any]]:
    """Flat pieces, of at most about CHUNK elements, of tensors of one shape; behind them None, if `whole`.

    Only pieces of a strided tensor are copied, never all of it.
    """
    first = tensors[0]
    size = CHUNK if first.device.type == "cpu" else CHUNK * ON_DEVICE
    end = [None] if whole else []
    if first.numel() <= size or first.dim() == 0:
        yield [tensor.reshape(-1) for tensor in tensors] + end
    elif all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, first.numel(), size):
            yield [tensor[start : start + size] for tensor in flat] + end
    elif first.shape[0] == 1:  # a single huge row: go one axis deeper
        yield from _chunks([tensor[0] for tensor in tensors], whole)
    else:
        rows = max(1, size // (first.numel() // first.shape[0]))
        for start in range(0, first.shape[0], rows):
            yield from _chunks([tensor[start : start + rows].contiguous() for tensor in tensors], whole)


def _less(values: Tensor, bound: float, or_equal: bool) -> Tensor:
    """values < bound, or ≤. On a CPU NumPy compares twice as fast as torch does."""
    if values.device.type == "cpu" and values.dtype != torch.bfloat16:
        compare = np.less_equal if or_equal else np.less
        return torch.from_numpy(compare(values.numpy(), bound))
    return values <= bound if or_equal else values < bound


def _take(values: Tensor, where: Tensor) -> Tensor:
    """values[where], a small part of them; on a CPU by NumPy, which finds the places many times as fast."""
    if values.device.type == "cpu" and values.dtype != torch.bfloat16:
        return torch.from_numpy(values.numpy()[np.flatnonzero(where.numpy())])
    return values[where]


def _and(mask: Tensor, other: Tensor) -> None:
    """mask &= other."""
    if mask.device.type == "cpu":
        np.bitwise_and(mask.numpy(), other.numpy(), out=mask.numpy())
    else:
        mask &= other


class _Bracket:
    """An interval of values, each end open or closed."""

    def __init__(self) -> None:
        self.low: float = -math.inf
        self.high: float = math.inf
        self.low_open = False
        self.high_open = False

    def below(self, values: Tensor) -> Tensor:
        return _less(values, self.low, self.low_open)

    def up_to(self, values: Tensor) -> Tensor:
        """What is below or inside."""
        return _less(values, self.high, not self.high_open)


def _kth_lowest(source: _Source, size: int, k: int) -> _Threshold:
    """The k-th lowest value, k ≥ 1."""
    outer = _Bracket()  # holds the k-th lowest value for certain
    outside_below = 0  # how many eligible elements are below it
    inside = size
    stride = max(1, size // SAMPLE, min(16, size // (SAMPLE // 16 + 1)))  # of a small model fewer are enough
    while True:
        sample = _sample(source, outer, stride)
        if sample.numel() == 0 and stride > 1:  # none of what may be selected lies at these positions
            sample = _sample(source, outer, 1)
        stride = 1
        if sample.numel() == 0:  # nothing but NaN is left to look at
            raise ValueError(f"{source.first_nan()}: scores contain NaN")
        guess = _guess(sample, (k - outside_below) / inside)
        below, found, values = _count(source, guess)
        if below < k <= below + found:
            if guess.low == guess.high:
                return _Threshold(guess.low, k - below, k == below + found)
            if values is not None:
                (t,) = _at_ranks(values, [k - below - 1])
                lower, equal = count_true(values < t), count_true(values == t)
                return _Threshold(t, k - below - lower, k == below + lower + equal)
            outer, outside_below, inside = guess, below, found
        elif k <= below:
            outer.high, outer.high_open = guess.low, True
            inside = below - outside_below
        else:
            outer.low, outer.low_open = guess.high, True
            inside = outside_below + inside - (below + found)
            outside_below = below + found


def _guess(sample: Tensor, share: float) -> _Bracket:
    """Where in a sample the quantile `share` lies, nearly for certain, or one value that has many ties.

    A value that makes up much of the sample is looked at by itself: a bracket that holds it stays too large to collect.
    """
    n = sample.numel()
    at = min(n - 1, max(0, round(share * n)))
    margin = math.ceil(4 * math.sqrt(n * max(at / n * (1 - at / n), 1 / n))) + 1
    guess = _Bracket()
    guess.low, middle, guess.high = _at_ranks(sample, [max(0, at - margin), at, min(n - 1, at + margin)])
    for value in (middle, guess.low, guess.high):
        if count_true(sample == value) > n / 20:
            guess.low = guess.high = value
            break
    return guess


def _sample(source: _Source, inside: _Bracket, stride: int) -> Tensor:
    """Values of the bracket, at most a few times SAMPLE of them, evenly spread over all positions."""
    taken: list[Tensor] = []
    count = 0
    for values, mask in source.chunks(stride):
        keep = inside.up_to(values) & ~inside.below(values)
        if mask is not None:
            keep &= mask
        picked = _take(values, keep)
        taken.append(picked)
        count += picked.numel()
        if count > 4 * SAMPLE and stride == 1:  # thin out what there is, again and again
            taken = [torch.cat([t.to(taken[0].device) for t in taken])[::4].clone()]
            count = taken[0].numel()
    return torch.cat([t.to(taken[0].device) for t in taken])


def _at_ranks(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """The values that would be at these places if all were sorted; no NaN among them."""
    if values.device.type == "cpu":
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return [float(value) for value in np.partition(array, sorted(set(ranks)))[list(ranks)]]
    return values.sort().values[list(ranks)].tolist()


def _count(source: _Source, inside: _Bracket) -> tuple[int, int, Tensor | None]:
    """One pass: how many lie below and inside the bracket, and those inside (None when they are too many)."""
    counts: dict[torch.device, Tensor] = {}  # below and inside, on each device: read once, at the end
    sums: dict[torch.device, Tensor] = {}
    collected: Tensor | None = None
    gathered = 0
    for values, mask in source.chunks():
        below = inside.below(values)
        within = inside.up_to(values)
        within ^= below
        if mask is not None:
            _and(below, mask)
            _and(within, mask)
        found = counts.setdefault(values.device, torch.zeros(2, dtype=torch.int64, device=values.device))
        on_cpu = values.device.type == "cpu"
        found[0] += count_true(below) if on_cpu else torch.count_nonzero(below)
        found[1] += count_true(within) if on_cpu else torch.count_nonzero(within)
        total = sums.setdefault(values.device, torch.zeros((), device=values.device))
        total += values.sum()
        if gathered <= COLLECT:
            piece = _take(values, within)
            if collected is None:  # one buffer: small pieces between the large temporaries would fragment the heap
                collected = piece.new_empty(COLLECT)
            if gathered + piece.numel() <= COLLECT:
                collected[gathered : gathered + piece.numel()] = piece
            gathered += piece.numel()
    # A NaN, perhaps of what is not eligible, or infinities of either sign: only now look closely.
    if any(math.isnan(float(total)) for total in sums.values()):
        name = source.first_nan()
        if name is not None:
            raise ValueError(f"{name}: scores contain NaN")
    assert collected is not None
    below_total, inside_total = (sum(int(found[i]) for found in counts.values()) for i in range(2))
    return below_total, inside_total, collected[:gathered] if gathered <= COLLECT else None

"""The k lowest scores of many layers, exactly: one place for ranking, counting and ties.

Nothing here concatenates the scores. A global selection finds the k-th lowest value by narrowing a bracket around it:
a sample guesses the bracket, one pass counts what lies below and collects the little that lies inside. The guess only
decides how many passes it takes, never the result. Ties are broken by position: first by the order of the layers, then
by the row-major position within a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # elements looked at in one go: what a pass needs in extra memory
SAMPLE = 1 << 16  # values the bracket is guessed from
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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


def lowest(scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Selects exactly the `k` lowest scores over all layers together.

    Args:
        scores: a floating tensor a layer, of any shape, stride and dtype; read at most a few times each, one at a time.
        eligible: bool tensors of the same shapes: what may be selected. Its order is the order of ties.
        k: how many, between 0 and the number of eligible elements.

    Returns:
        bool tensors of the same shapes and names, True = selected.

    Raises:
        ValueError: a score of an eligible element is NaN (the layer is named), or k is out of range.

    >>> s = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    >>> lowest(s, {n: torch.ones(2, dtype=torch.bool) for n in s}, 1)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}
    """
    return dict(select_lowest(scores, eligible, k))


def select_lowest(scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor], k: int) -> Iterator[tuple[str, Tensor]]:
    """`lowest`, layer by layer: only one layer's selection is in memory. Errors come before the first one."""
    names = list(eligible)
    dtype = _check(scores, eligible)
    counts = {name: int(torch.count_nonzero(eligible[name])) for name in names}
    size = sum(counts.values())
    if not 0 <= k <= size:
        raise ValueError(f"cannot select {k} of {size} elements")
    # A mask with every element set is not worth reading again and again.
    masks = {name: None if counts[name] == eligible[name].numel() else eligible[name] for name in names}

    def layer(name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        for values, mask in _chunks(scores[name].detach(), masks[name]):
            yield values.to(dtype), mask

    def chunks() -> Iterator[tuple[Tensor, Tensor | None]]:
        for name in names:
            if counts[name]:
                yield from layer(name)

    threshold, ties = -math.inf, 0
    if k:
        threshold, ties = _kth_lowest(chunks, size, k, lambda: _first_nan(scores, eligible))
    return ((name, chosen) for name, chosen in _pick(names, layer, eligible, threshold, ties))


def _pick(
    names: Sequence[str],
    layer: Callable[[str], Iterator[tuple[Tensor, Tensor | None]]],
    eligible: Mapping[str, Tensor],
    threshold: float,
    ties: int,
) -> Iterator[tuple[str, Tensor]]:
    """What lies below the threshold, and the first `ties` elements that equal it, in row-major order."""
    for name in names:
        chosen = torch.zeros(eligible[name].shape, dtype=torch.bool, device=eligible[name].device)
        flat, at = chosen.view(-1), 0
        for values, mask in layer(name):
            part = flat[at : at + values.numel()]
            at += values.numel()
            torch.lt(values, threshold, out=part)
            equal = values == threshold if ties else None
            if mask is not None:
                part &= mask
            if equal is None:
                continue
            if mask is not None:
                equal &= mask
            here = int(torch.count_nonzero(equal))
            if here > ties:
                equal[equal.nonzero()[ties:, 0]] = False
            part |= equal
            ties -= min(here, ties)
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
    rows = max(1, CHUNK // max(1, scores.shape[1]))
    rank = torch.arange(scores.shape[1], device=scores.device)
    for start in range(0, scores.shape[0], rows):
        part = slice(start, start + rows)
        # Two stable sorts, the more important key last: an ineligible element never stands before an eligible +inf.
        order = torch.argsort(scores[part], dim=1, stable=True)
        last = torch.argsort((~eligible[part]).gather(1, order).to(torch.uint8), dim=1, stable=True)
        chosen[part].scatter_(1, order.gather(1, last), rank < quotas[part, None])
    return chosen


def _check(scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds every layer's scores exactly; raises where a score does not fit its layer."""
    dtype: torch.dtype | None = None
    for name, mask in eligible.items():
        score = scores[name]
        if score.shape != mask.shape:
            raise ValueError(f"{name}: scores of shape {list(score.shape)} for weights of shape {list(mask.shape)}")
        if not score.dtype.is_floating_point:
            raise TypeError(f"{name}: scores must be floating point, not {score.dtype}")
        dtype = score.dtype if dtype is None else torch.promote_types(dtype, score.dtype)
    assert dtype is not None
    return dtype


def _chunks(values: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Flat pieces of at most about CHUNK elements; only pieces of a strided tensor are copied, never the whole."""
    if values.numel() <= CHUNK or values.dim() == 0:
        yield values.reshape(-1), None if mask is None else mask.reshape(-1)
    elif values.is_contiguous() and (mask is None or mask.is_contiguous()):
        flat_mask = None if mask is None else mask.view(-1).split(CHUNK)
        for i, piece in enumerate(values.view(-1).split(CHUNK)):
            yield piece, None if flat_mask is None else flat_mask[i]
    else:
        rows = max(1, CHUNK // (values.numel() // values.shape[0]))
        for start in range(0, values.shape[0], rows):
            part = slice(start, start + rows)
            if values.shape[0] == 1:  # a single huge row: go one axis deeper
                yield from _chunks(values[0], None if mask is None else mask[0])
            else:
                yield from _chunks(values[part].contiguous(), None if mask is None else mask[part].contiguous())


def _first_nan(scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor]) -> str | None:
    for name, mask in eligible.items():
        if bool(torch.isnan(scores[name]).logical_and_(mask).any()):
            return name
    return None


class _Bracket:
    """An interval of values, each end open or closed."""

    def __init__(self) -> None:
        self.low: float = -math.inf
        self.high: float = math.inf
        self.low_open = False
        self.high_open = False

    def below(self, values: Tensor) -> Tensor:
        return values <= self.low if self.low_open else values < self.low

    def up_to(self, values: Tensor) -> Tensor:
        """What is below or inside."""
        return values < self.high if self.high_open else values <= self.high


def _kth_lowest(
    chunks: Callable[[], Iterator[tuple[Tensor, Tensor | None]]],
    size: int,
    k: int,
    first_nan: Callable[[], str | None],
) -> tuple[float, int]:
    """The k-th lowest value t (k ≥ 1), and how many of the elements equal to t belong to the k lowest."""
    outer = _Bracket()  # holds the k-th lowest value for certain
    outside_below = 0  # how many eligible elements are below it
    inside = size
    exact = False  # guess single values instead of a bracket: for distributions with few distinct values
    while True:
        stride = max(1, inside // SAMPLE) if outer.low == -math.inf and outer.high == math.inf else 1
        sample = _sample(chunks, outer, stride)
        if sample.numel() == 0:  # nothing but NaN is left to look at
            raise ValueError(f"{first_nan()}: scores contain NaN")
        n = sample.numel()
        at = min(n - 1, max(0, round((k - outside_below) / inside * n)))
        margin = 0 if exact else math.ceil(4 * math.sqrt(n * max(at / n * (1 - at / n), 1 / n))) + 1
        guess = _Bracket()
        guess.low = float(sample[max(0, at - margin)])
        guess.high = float(sample[min(n - 1, at + margin)])
        below, found, values = _count(chunks, guess, first_nan)
        if below < k <= below + found:
            if guess.low == guess.high:
                return guess.low, k - below
            if values is not None:
                t = float(torch.kthvalue(values, k - below).values)
                return t, k - below - int(torch.count_nonzero(values < t))
            exact = guess.low == outer.low and guess.high == outer.high  # nothing gained: look at single values
            outer, outside_below, inside = guess, below, found
        elif k <= below:
            outer.high, outer.high_open = guess.low, True
            inside = below - outside_below
        else:
            outer.low, outer.low_open = guess.high, True
            inside = outside_below + inside - (below + found)
            outside_below = below + found


def _sample(chunks: Callable[[], Iterator[tuple[Tensor, Tensor | None]]], inside: _Bracket, stride: int) -> Tensor:
    """Sorted values of the bracket, at most a few times SAMPLE of them, evenly spread over all positions."""
    taken, count = [], 0
    for values, mask in chunks():
        picked = values[::stride] if stride > 1 else values
        keep = inside.up_to(picked) & ~inside.below(picked)
        if mask is not None:
            keep &= mask[::stride] if stride > 1 else mask
        picked = picked[keep]
        taken.append(picked)
        count += picked.numel()
        if count > 4 * SAMPLE and stride == 1:  # thin out what there is: half of it, again and again
            taken = [torch.cat([t.to(taken[0].device) for t in taken])[::4].clone()]
            count = taken[0].numel()
    return torch.cat([t.to(taken[0].device) for t in taken]).sort().values


def _count(
    chunks: Callable[[], Iterator[tuple[Tensor, Tensor | None]]],
    inside: _Bracket,
    first_nan: Callable[[], str | None],
) -> tuple[int, int, Tensor | None]:
    """One pass: how many lie below and inside the bracket, and those inside (None when they are too many)."""
    counts: dict[torch.device, Tensor] = {}  # below and inside, on each device: read once, at the end
    sums: dict[torch.device, Tensor] = {}
    collected: Tensor | None = None
    gathered = 0
    for values, mask in chunks():
        below = inside.below(values)
        within = inside.up_to(values)
        if mask is not None:
            below &= mask
            within &= mask
        within ^= below
        count = counts.setdefault(values.device, torch.zeros(2, dtype=torch.int64, device=values.device))
        count[0] += torch.count_nonzero(below)
        count[1] += torch.count_nonzero(within)
        total = sums.setdefault(values.device, torch.zeros((), device=values.device))
        total += values.sum() if mask is None else (values * mask).sum()
        if gathered <= COLLECT:
            piece = values[within]
            if collected is None:  # one buffer: small pieces between the large temporaries would fragment the heap
                collected = piece.new_empty(COLLECT)
            if gathered + piece.numel() <= COLLECT:
                collected[gathered : gathered + piece.numel()] = piece
            gathered += piece.numel()
    if any(
        math.isnan(float(total)) for total in sums.values()
    ):  # a NaN, or infinities of either sign: only now look closely
        name = first_nan()
        if name is not None:
            raise ValueError(f"{name}: scores contain NaN")
    assert collected is not None
    below_total, found = (sum(int(count[i]) for count in counts.values()) for i in range(2))
    return below_total, found, collected[:gathered] if gathered <= COLLECT else None

"""Which pruner goes with which AP variant and rewind: a table, used by the check at configuration and by the docs."""

from __future__ import annotations

from dataclasses import dataclass

from ap.cycles import VARIANTS
from ap.names import unknown
from ap.rewind import Rewind
from pruners.base import Pruner, names

REWINDS = ("init", "step", "lr", "none")


@dataclass(frozen=True)
class Compatibility:
    """What a pruner can be combined with.

    Attributes:
        variants: of AP.
        rewinds: kinds of rewind: "step" stands for "500it" and "2ep".
        cycles: the most cycles that make sense; None for any number.
        why: the reason for what is missing; "" where nothing is.
    """

    variants: tuple[str, ...] = VARIANTS
    rewinds: tuple[str, ...] = REWINDS
    cycles: int | None = None
    why: str = ""


ANY = Compatibility()
_SMALLER = Compatibility(
    ("none", "lite", "pro"),
    ("lr", "none"),
    why="its layers get smaller, so earlier weights fit no more, and its amount is a share of channels",
)
TABLE: dict[str, Compatibility] = {
    "nm": Compatibility(
        ("none",),
        cycles=1,
        why="N:M fixes the density in one step, which leaves AP no share and a second cycle nothing",
    ),
    **{
        f"structured-{name}": _SMALLER
        for name in ("apoz", "bn-scale", "hessian", "lamp", "magnitude", "random", "taylor")
    },
    "structured-demp": Compatibility(
        ("none",), ("lr", "none"), why="its layers get smaller, and dead units alone decide how many go"
    ),
    "synaptic-stripping": Compatibility(
        ("none",), why="it strips dead units itself, as AP does: it is the baseline to compare AP with"
    ),
}


def compatibility(pruner: str | Pruner) -> Compatibility:
    """What a pruner can be combined with; everything for those that the table does not name.

    Example:
        >>> compatibility("nm").variants
        ('none',)
    """
    return TABLE.get(pruner if isinstance(pruner, str) else pruner.name, ANY)


def check_combination(
    pruner: str | Pruner, variant: str = "none", rewind: str | Rewind = "none", cycles: int | None = None
) -> None:
    """To be called when an experiment is configured: refuses what makes no sense, with the reason.

    Args:
        pruner: a name or a pruner.
        variant: "none", "lite", "pro" or "solo", alone or with a criterion ("pro:pruner"). "solo" uses no pruner, so
            with it everything passes.
        rewind: "init", "500it", "2ep", "lr" or "none".
        cycles: how many prunings, if known.

    Raises:
        ValueError: unknown names (the close ones are listed), or a combination that does not work.

    Example:
        >>> check_combination("lamp", "pro", "500it")
        >>> check_combination("structured-magnitude", "lite", "init")
        Traceback (most recent call last):
        ...
        ValueError: structured-magnitude does not go with rewind='init' (only lr, none): its layers get smaller, so \
earlier weights fit no more, and its amount is a share of channels
    """
    variant = variant.partition(":")[0]
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    kind = Rewind.parse(rewind, steps_per_epoch=1).kind
    name = pruner if isinstance(pruner, str) else pruner.name
    if isinstance(pruner, str) and name not in names():
        raise unknown("pruner", name, names())
    if variant == "solo":
        return
    fits = compatibility(pruner)
    if variant not in fits.variants:
        raise ValueError(f"{name} does not go with ap={variant!r} (only {', '.join(fits.variants)}): {fits.why}")
    if kind not in fits.rewinds:
        raise ValueError(f"{name} does not go with rewind={kind!r} (only {', '.join(fits.rewinds)}): {fits.why}")
    if fits.cycles is not None and cycles is not None and cycles > fits.cycles:
        raise ValueError(f"{name} does not go with {cycles} cycles (at most {fits.cycles}): {fits.why}")


def table() -> str:
    """The table in Markdown, as it stands in the documentation."""
    rows = ["| pruner | AP variants | rewinds | cycles | why not the others |", "| --- | --- | --- | --- | --- |"]
    for name in names():
        fits = compatibility(name)
        variants = "all" if fits.variants == VARIANTS else ", ".join(fits.variants)
        rewinds = "all" if fits.rewinds == REWINDS else ", ".join(fits.rewinds)
        rows.append(f"| `{name}` | {variants} | {rewinds} | {fits.cycles or 'any'} | {fits.why} |")
    return "\n".join(rows)

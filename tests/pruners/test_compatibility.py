"""The table of what goes together, and that the loop agrees with it."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pruners
from ap.cycles import VARIANTS, Cycles
from ap.masks import Masks
from pruners.compatibility import REWINDS, TABLE, table
from recipes import models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nm", "lite"), "nm does not go with ap='lite'"),
        (("nm", "none", "none", 2), "2 cycles"),
        (("structured-magnitude", "lite", "init"), "rewind='init'"),
        (("structured-magnitude", "none", "500it"), "rewind='step'"),
        (("structured-demp", "pro:pruner", "none"), "ap='pro'"),
        (("synaptic-stripping", "lite"), "baseline"),
        (("lmap", "lite"), "unknown pruner 'lmap'; close: lamp"),
        (("lamp", "light"), "unknown variant 'light'; close: lite"),
        (("lamp", "lite", "sometimes"), "rewind must be"),
    ],
)
def test_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruners.check_combination(*arguments)


def test_what_is_allowed():
    for variant in [*VARIANTS, "pro:pruner", "lite:random"]:
        for rewind in ("init", "500it", "2ep", "lr", "none"):
            pruners.check_combination("lamp", variant, rewind, 20)
            pruners.check_combination("nm", "solo", rewind, 20)  # solo uses no pruner
    pruners.check_combination("structured-apoz", "lite", "none")
    pruners.check_combination(pruners.create(lambda model, masks: {}), "pro", "init")


def test_the_table_names_registered_pruners_and_every_refusal_has_a_reason():
    assert set(TABLE) <= set(pruners.names())
    assert {name for name in pruners.names() if name.startswith("structured-")} <= set(TABLE)
    for fits in TABLE.values():
        assert fits.why
        assert set(fits.variants) <= set(VARIANTS)
        assert set(fits.rewinds) <= set(REWINDS)


@pytest.mark.parametrize("name", pruners.names())
def test_the_loop_runs_what_the_table_allows(name):
    """Two cycles, or as many as fit, in every variant and kind of rewind that the table has."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3]))]
    fits = pruners.compatibility(name)
    needs_rounds = {"rounds": 2} if name == "synflow" else {}
    for variant in fits.variants:
        for rewind in {"init": "init", "step": "1it", "lr": "lr", "none": "none"}.items():
            if rewind[0] not in fits.rewinds:
                continue
            torch.manual_seed(0)
            norms = name == "structured-bn-scale"
            model = models.create("resnet20" if norms else "cnn", image_size=8, width=0.25 if norms else 0.5)
            total = Masks(model).total

            def train(model, masks, run):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                for step in range(run.start_step, 2):
                    optimizer.zero_grad()
                    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
                    optimizer.step()
                    run.reached(step + 1)
                return {}

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # nm names the first convolution
                history = Cycles(
                    model,
                    pruners.create(name, **needs_rounds),
                    cycles=fits.cycles or 2,
                    amount=0.5 if name == "nm" else 0.2,
                    ap=variant,
                    rate=0.05,
                    rewind=rewind[1],
                    batches=batches,
                    loss_fn=F.cross_entropy,
                ).run(train)
            alive = total
            assert len(history) == (fits.cycles or 2) + 1
            for row in history[1:]:
                assert row["alive"] == alive - row["pruned"] - row["activated"]
                if not name.startswith(("structured-", "nm")):
                    assert row["alive"] == alive - round(0.2 * alive)
                assert row["total"] == total
                alive = row["alive"]
            for parameter in model.parameters():
                assert parameter.isfinite().all()


def test_the_documentation_has_this_table():
    document = Path(__file__).parents[2] / "docs" / "pruners.md"
    assert table() in document.read_text(encoding="utf-8")

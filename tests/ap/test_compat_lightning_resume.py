"""A Trainer that stops in the middle of a cycle and goes on from its checkpoint ends where an unbroken one does."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ap.compat.lightning import APCallback
from recipes.data import load

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(
    folder: Path, epochs: int, resume: Path | None = None, beside: bool = False
) -> tuple[Net, APCallback, pl.Trainer]:
    """Trains to this epoch, from the start or from a checkpoint; cycles of two epochs, so that epoch 3 is in one."""
    pl.seed_everything(0, verbose=False)
    model = Net()

    def magnitude(module: nn.Module, share: float) -> None:
        assert ap.plugin is not None
        masks = ap.plugin.masks
        masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=share)

    ap = APCallback(None if beside else magnitude, epochs=2, cycles=2, amount=0.25, rate=0.05)
    lightnings = ModelPruning(
        "l1_unstructured",
        [(model.net[1], "weight"), (model.net[3], "weight")],
        amount=ap.amount_for,
        apply_pruning=ap.prunes_at,
        use_lottery_ticket_hypothesis=False,
    )
    every_epoch = ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)
    digits = load("digits")
    data = TensorDataset(digits.normalise(digits.train.images[:200]), digits.train.labels[:200])
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[lightnings, ap, every_epoch] if beside else [ap, every_epoch],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(data, batch_size=20), ckpt_path=resume)
    return model, ap, trainer


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside ModelPruning"])
@pytest.mark.parametrize("saved", ["while training", "afterwards"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4], ids=["first cycle", "between cycles", "second cycle", "after all"])
def test_resumed_to_the_same_bits(tmp_path: Path, stop: int, saved: str, beside: bool) -> None:
    whole, whole_ap, _ = fit(tmp_path / "whole", 5, beside=beside)
    _, first, trainer = fit(tmp_path / "first", stop, beside=beside)
    checkpoint = tmp_path / "first" / f"epoch={stop - 1}.ckpt"
    if saved == "afterwards":
        trainer.save_checkpoint(checkpoint)
    resumed, ap, _ = fit(tmp_path / "second", 5, resume=checkpoint, beside=beside)
    assert first.plugin is not None
    assert ap.plugin is not None
    assert whole_ap.plugin is not None
    assert first.plugin.masks.alive == {1: 2368, 2: 1776, 3: 1776, 4: 1332}[stop]
    assert ap.plugin.masks.alive == 1332
    for name in ap.plugin.masks:
        assert torch.equal(ap.plugin.masks[name], whole_ap.plugin.masks[name])
    for own, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, other)
    assert sum(int((w != 0).sum()) for w in (resumed.net[1].weight, resumed.net[3].weight)) == 1332

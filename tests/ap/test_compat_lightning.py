"""The Lightning callbacks in a real Trainer, alone and beside ModelPruning."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ap.compat.lightning import APCallback, DNRCallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("beside", [False, True])
def test_two_cycles_reach_the_exact_density_and_the_logger_has_the_rates(tmp_path: Path, beside: bool) -> None:
    pl.seed_everything(0)
    model = Net()

    def magnitude(module: nn.Module, share: float) -> None:
        masks = ap.plugin.masks
        masks.prune({n: masks.weight(n).detach().abs() for n in masks}, amount=share)

    ap = APCallback(None if beside else magnitude, cycles=2, amount=0.25, rate=0.05)
    callbacks: list[pl.Callback] = [DNRCallback(every=1), ap]
    if beside:
        parts = [(model.net[0], "weight"), (model.net[2], "weight")]
        callbacks.insert(
            1,
            ModelPruning(
                "l1_unstructured",
                parts,
                amount=ap.amount_for,
                apply_pruning=ap.prunes_at,
                use_lottery_ticket_hypothesis=False,
            ),
        )
    logger = CSVLogger(tmp_path)
    data = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    assert ap.plugin is not None
    assert ap.plugin.masks.alive == 180  # 320 → 240 → 180
    assert "dnr/train/model/total" in (Path(logger.log_dir) / "metrics.csv").read_text()

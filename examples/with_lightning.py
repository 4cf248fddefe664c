"""AP and each layer's dead-neuron rate in Lightning, by callbacks; the Trainer's own loggers get the rates."""

import csv
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pruners
from ap.compat.lightning import APCallback, DNRCallback
from recipes.data import load


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)
        )

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


def magnitude(model, share):
    """Any function that zeroes or masks this share of what is alive."""
    pruners.create("magnitude").prune(model, ap.plugin.masks, amount=share)


warnings.filterwarnings("ignore", module="lightning")  # its advice on workers and logging intervals
pl.seed_everything(0, verbose=False)
digits = load("digits")
train, test = (TensorDataset(digits.normalise(part.images), part.labels) for part in (digits.train, digits.test))
ap = APCallback(magnitude, epochs=2, cycles=5, amount=0.3)  # then two more epochs with the last masks
trainer = pl.Trainer(
    max_epochs=12,
    accelerator="cpu",
    callbacks=[ap, DNRCallback(every=5)],
    logger=CSVLogger("runs", name="lightning"),
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Net(), DataLoader(train, batch_size=50, shuffle=True), DataLoader(test, batch_size=397))

print(f"{ap.plugin.masks.alive} of {ap.plugin.masks.total} weights alive")
for row in csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").open()):
    if row["dnr/train/model/total"]:
        print(f"step {row['step']:>3}: dead neurons while training {float(row['dnr/train/model/total']):.1%}")
    elif row["accuracy"]:
        print(f"step {row['step']:>3}: accuracy {float(row['accuracy']):.1%}")

"""A LightningModule and a Trainer."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.data import load


class Classifier(pl.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, index):
        self.loss = F.cross_entropy(self(batch[0]), batch[1])
        return self.loss

    def validation_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    digits = load("digits")
    train, test = (TensorDataset(digits.normalise(part.images), part.labels) for part in (digits.train, digits.test))
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True), DataLoader(test, batch_size=397))
    print(model.loss.item(), trainer.callback_metrics["accuracy"].item())

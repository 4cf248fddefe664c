"""A model, optimizer, schedule and averaged weights of timm's."""

import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from recipes.data import load


def main():
    torch.manual_seed(0)
    digits = load("digits")
    images = F.interpolate(digits.normalise(digits.train.images), size=32).expand(-1, 3, -1, -1)
    loader = DataLoader(TensorDataset(images, digits.train.labels), batch_size=100, shuffle=True)
    model = timm.create_model("resnet10t", num_classes=10, drop_path_rate=0.1)
    optimizer = timm.optim.create_optimizer_v2(model, opt="lamb", lr=0.005, weight_decay=0.02)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=1, cooldown_epochs=0, min_lr=1e-5)
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    for epoch in range(epochs):
        model.train()
        for image, label in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(image), label)
            loss.backward()
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
    print(loss.item())


main()

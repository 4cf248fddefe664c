"""In the manner of torchvision's reference scripts: arguments, data loaders, train_one_epoch, evaluate, checkpoints."""

import argparse
import os

import torch
import torch.utils.data
import torchvision
from torch import nn

from recipes.data import load


def load_data(args):
    digits = load("digits")
    train, test = (
        torch.utils.data.TensorDataset(digits.normalise(part.images).expand(-1, 3, -1, -1), part.labels)
        for part in (digits.train, digits.test)
    )
    return train, test


def train_one_epoch(model, criterion, optimizer, data_loader, epoch, args, model_ema=None):
    model.train()
    for i, (image, target) in enumerate(data_loader):
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model_ema is not None and i % args.model_ema_steps == 0:
            model_ema.update_parameters(model)
    print(f"Epoch: [{epoch}] loss {loss.item()}")


def evaluate(model, criterion, data_loader, log_suffix=""):
    model.eval()
    correct = total = 0
    with torch.inference_mode():
        for image, target in data_loader:
            output = model(image)
            correct += (output.argmax(1) == target).sum().item()
            total += len(target)
    print(f"Test: {log_suffix} Acc@1 {correct / total}")


def main(args):
    torch.manual_seed(0)
    dataset, dataset_test = load_data(args)
    data_loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True
    )
    data_loader_test = torch.utils.data.DataLoader(dataset_test, batch_size=args.batch_size)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=10)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    parameters = torchvision.ops._utils.split_normalization_params(model)
    groups = [{"params": p, "weight_decay": w} for p, w in zip(parameters, (0.0, args.weight_decay), strict=True) if p]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    model_ema = torch.optim.swa_utils.AveragedModel(model) if args.model_ema else None
    for epoch in range(args.epochs):
        train_one_epoch(model, criterion, optimizer, data_loader, epoch, args, model_ema)
        scheduler.step()
        evaluate(model, criterion, data_loader_test)
        if model_ema:
            evaluate(model_ema, criterion, data_loader_test, log_suffix="EMA")
        if args.output_dir:
            os.makedirs(args.output_dir, exist_ok=True)
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "args": args,
            }
            torch.save(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))


def get_args_parser(add_help=True):
    parser = argparse.ArgumentParser(description="PyTorch Classification Training", add_help=add_help)
    parser.add_argument("--model", default="resnet18", type=str)
    parser.add_argument("-b", "--batch-size", default=100, type=int)
    parser.add_argument("--epochs", default=1, type=int)
    parser.add_argument("-j", "--workers", default=1, type=int)
    parser.add_argument("--lr", default=0.1, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--weight-decay", default=1e-4, type=float)
    parser.add_argument("--label-smoothing", default=0.1, type=float)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--model-ema-steps", type=int, default=4)
    parser.add_argument("--output-dir", default=".", type=str)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())

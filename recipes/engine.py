"""What the trainings of a run share, on a CPU and on a GPU: data, precision, optimizer, evaluation."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap.activations import param_groups
from recipes import distributed
from recipes.config import Experiment
from recipes.data import ImageData
from recipes.resident import Resident
from recipes.streamed import Streamed, fits
from recipes.training import Diverged, Stopped, Training

__all__ = ["Diverged", "Engine", "Stopped", "Training", "can_capture", "device_of"]


def device_of(name: str) -> torch.device:
    """The device of this name, "auto" being a GPU where there is one; ValueError for one that is not there.

    Under torchrun it is this process's own GPU.
    """
    name = distributed.local_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:  # the second where this build of torch knows nothing of it
        why = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"--device {name} cannot be used here: {why}") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bfloat16; one from before Ampere only emulates that, slowly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def tell_cublas(config: Experiment) -> None:
    """What it wants to be told before it is used first in a process, to be deterministic."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def can_capture(config: Experiment, device: torch.device) -> bool:
    """Whether steps can be captured in a CUDA graph: on one GPU, where no criterion follows each of them in Python."""
    followed = any(arm.criterion == "decay-corrected" for arm in config.arms)
    return device.type == "cuda" and not followed and not distributed.launched()


def check_batches(config: Experiment, data: ImageData) -> None:
    """ValueError where a batch is larger than the training set, or cannot be shared out among the processes."""
    for name in ("batch_size", "score_size"):
        size = getattr(config, name)
        if size is not None and size > len(data.train):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {size} is more than the {len(data.train):,} training images")
    if config.batch_size % (distributed.size() * config.accumulate):
        parts = f"{distributed.size()} processes × --accumulate {config.accumulate}"
        raise ValueError(f"--batch-size {config.batch_size} is not a multiple of {parts}")


class Engine:
    """What all trainings of a run share: the data on the device, precision, optimizer, evaluation.

    Args:
        config: the experiment.
        data: its data set.
        seed: of the data order and the augmentation.

    Raises:
        ValueError: a device that is not there, or a batch larger than the training set.
    """

    def __init__(self, config: Experiment, data: ImageData, seed: int) -> None:
        check_batches(config, data)
        self.config, self.seed = config, seed
        self.device = device_of(config.device)
        on_gpu = self.device.type == "cuda"
        self.captured = config.step == "captured" or (config.step == "auto" and can_capture(config, self.device))
        self._compiled: tuple[nn.Module, nn.Module] | None = None
        # On a CPU it is enough that the batches are: convolutions follow them, and with weights in this format as well
        # a step of a ResNet-20, VGG-11, MobileNet-V2 or small CNN took 0.99 to 1.05 × the time, pruning up to 1.9 ×.
        self.channels_last = on_gpu
        self.half = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16(self.device))
        if on_gpu:
            torch.backends.cudnn.benchmark = not config.deterministic
            tell_cublas(config)
        torch.use_deterministic_algorithms(config.deterministic)
        augment = data.augment if config.augment == "data" else config.augment
        stream = config.stream == "yes" or (config.stream == "auto" and not fits(data, self.device))
        held = functools.partial(Streamed, stride=config.batch_size) if stream else Resident
        self.train_set: Resident = held(
            data.train, data, self.device, augment, config.cutout, config.mixup, config.crop_area
        )
        self.val_set: Resident | None = held(data.val, data, self.device) if len(data.val) else None
        self.test_set: Resident = held(data.test, data, self.device)
        self.steps_per_epoch = len(data.train) // config.batch_size

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory format that is fast there."""
        model = model.to(self.device)
        if self.config.sync_batchnorm and distributed.size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where the forward pass computes in bfloat16, if it does."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.half else contextlib.nullcontext()

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, without smoothing: what pruners that need a loss are given, and what is reported."""
        return F.cross_entropy(outputs.float(), targets)

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training minimises."""
        return F.cross_entropy(outputs, targets, label_smoothing=self.config.label_smoothing)

    def called(self, model: nn.Module) -> nn.Module:
        """What training calls instead of the model: the same, or the compiled one."""
        if not self.config.compile:
            return model
        if self._compiled is None or self._compiled[0] is not model:
            self._compiled = model, torch.compile(model)  # type: ignore[assignment]
        return self._compiled[1]  # type: ignore[index]

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer, fused, without decay on activations' own parameters."""
        config = self.config
        groups = param_groups(model, config.weight_decay)
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        betas = (config.momentum, 0.999)
        return kind(groups, lr=lr, betas=betas, fused=True, capturable=self.captured)

    def score_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Training images without augmentation, for pruners and criteria that need data; the same for every arm.

        Processes share them out where that is known to give the scores of all of them together.
        """
        config = self.config
        order, size = self.train_set.epoch(self.seed, 0).order, config.score_size or config.batch_size
        count = min(config.score_batches, len(order) // size)
        which = range(count)
        reduced = not config.pruner.startswith("structured-")
        if reduced and count % distributed.size() == 0:
            which = which[distributed.rank() :: distributed.size()]
        return [self.train_set.plain(order[i * size : (i + 1) * size]) for i in which]

    def probe_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The held-out images that dead neurons are counted on: of the validation set, or the test set without one."""
        return list((self.val_set or self.test_set).batches(limit=self.config.probe))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Resident) -> tuple[float, float]:
        """(accuracy in [0, 1], mean cross-entropy), in evaluation mode."""
        model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y in images.batches(every=distributed.size(), first=distributed.rank()):
            with self.autocast():
                outputs = model(x).float()
            right += (outputs.argmax(1) == y).sum()
            loss += F.cross_entropy(outputs, y, reduction="sum")
        distributed.sum_(right, loss)
        return int(right) / len(images), float(loss) / len(images)

    def training(self, model: nn.Module, start_step: int, cycle: int, *args: Any, **options: Any) -> Training:
        """A training of `model` from where it stands, see `Training`."""
        return Training(self, model, start_step, cycle, *args, **options)

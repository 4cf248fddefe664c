"""What an experiment is: typed, validated where it is made, and saved as it is."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import ap.activations
import pruners
from ap import criteria
from ap.cycles import VARIANTS
from ap.names import unknown
from ap.plugin import split
from ap.rewind import Rewind
from recipes import data as data_sets
from recipes import models

SCHEMA = 1
# Far above what anybody runs: beyond, a slip of the keyboard would take all memory before anything is said.
_MOST = {"seeds": 10_000, "cycles": 10_000, "first_seed": 2**62, "image_size": 4096, "threads": 1024}


@dataclass(frozen=True)
class Arm:
    """One way of pruning to be compared: a variant of AP, and the criterion by which it removes weights.

    >>> Arm.parse("pro:pruner")
    Arm(variant='pro', criterion='pruner')
    >>> str(Arm.parse("lite")), Arm.parse("lite").criterion
    ('lite', 'least-moved-negative')
    """

    variant: str
    criterion: str

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From `variant` or `variant:criterion`; ValueError for anything else, with the close names."""
        variant, colon, criterion = text.partition(":")
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        if variant == "none" and colon:
            raise ValueError(f"--ap {text}: `none` has no criterion, since AP removes nothing there")
        if text == "solo:pruner":
            raise ValueError("--ap solo:pruner contradicts itself: solo has no pruner")
        if colon and criterion not in criteria.names():
            raise unknown("criterion", criterion, criteria.names())
        return cls(variant, criterion if colon else "least-moved-negative")

    def __str__(self) -> str:
        return self.variant if self.criterion == "least-moved-negative" else f"{self.variant}:{self.criterion}"

    @property
    def folder(self) -> str:
        """Its name in paths.

        >>> Arm.parse("pro:pruner").folder
        'pro-pruner'
        """
        return str(self).replace(":", "-")


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.arm.folder}-seed{self.seed}"


@dataclass(frozen=True)
class Span:
    """A number of optimizer steps, given as such ("20000it") or in epochs ("25ep").

    >>> Span.parse("25ep", "--warmup").steps(781), Span.parse("20000it", "--warmup").steps(781)
    (19525, 20000)
    """

    number: float
    unit: Literal["it", "ep"]

    @classmethod
    def parse(cls, text: str, what: str = "a span") -> Span:
        """From "500it", "25ep" or "0.5ep"; ValueError, beginning with `what`, for other texts."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)(it|ep)", text)
        if match is None or (match[2] == "it" and "." in match[1]):
            raise ValueError(f"{what} must be steps such as 500it or epochs such as 25ep, not {text!r}")
        return cls(float(match[1]), "it" if match[2] == "it" else "ep")

    def steps(self, steps_per_epoch: int) -> int:
        """The same in optimizer steps."""
        return round(self.number if self.unit == "it" else self.number * steps_per_epoch)


@dataclass(frozen=True)
class Experiment:
    """Arms × seeds on one model and data set. Every field is an option of the command line, and is saved.

    Raises ValueError where a value is out of range or a name is unknown.
    """

    # --- what is compared ---
    ap: tuple[str, ...] = ("none", "lite")
    """The arms to compare, variant[:criterion]: none, lite, pro or solo; pro:pruner is the control of pro."""
    pruner: str = "magnitude"
    """The pruner that AP accompanies; `list` names all."""
    cycles: int = 20
    """How many prunings; n of them give n + 1 trained networks."""
    amount: float = 0.2
    """p: the share of the weights alive that each cycle removes, AP's part included."""
    rate: float = 0.02
    """q: the share of the weights alive that AP removes in each cycle (lite and pro)."""
    where: str = "all"
    """Where AP may remove: all, rectified, or names and globs of layers, separated by commas."""
    allocation: Literal["global", "as-ap"] = "global"
    """For other criteria than AP's: compared globally, or from each layer as many as AP would take there."""
    rewind: str = "init"
    """Where the weights go back to after each pruning: init, a step (500it, 2ep), lr, or none to fine-tune."""
    score_batches: int = 10
    """How many batches of training images a pruner or criterion that needs data is given."""
    score_size: int | None = None
    """How many images each of these batches has; as --batch-size if not given."""
    seeds: int = 3
    """How many seeds: 0 … N−1. Arms of one seed share initial weights, data order and augmentation."""
    first_seed: int = 0
    """Where the seeds begin, to confirm a result with fresh ones."""

    # --- model and data ---
    model: str = "cnn"
    """The model: a name that `list` shows, or package.module:factory for your own."""
    activation: str | None = None
    """The activation, of those that `list` shows; the model's own if not given."""
    width: float = 1.0
    """Scales the model's number of channels."""
    weights: str | None = None
    """A file of weights to start from instead of a random initialisation (safetensors or a torch state dict)."""
    data: str = "digits"
    """A data set that `list` shows, or a folder of images: FOLDER/train/<class>/*, FOLDER/val/<class>/*."""
    data_root: str | None = None
    """Where the data's files are; $AP_DATA or ./data if not given."""
    download: bool = False
    """Whether missing data may be downloaded."""
    image_size: int | None = None
    """The side in pixels that a folder's images are resized to, or a data set's are shrunk to (a divisor of theirs)."""
    val: float | None = None
    """The share (below 1) or number of training images held out for validation; the data set's own default if None."""
    inputs: Literal["standard", "non-negative"] = "standard"
    """Images are normalised to mean 0 and variance 1, or to [0, 1], as AP's argument needs it in the first layer."""
    # A negative weight pushes a neuron down only if its input is not negative.
    train_images: int | None = None
    """Train on this many images only, every class in its share: for trying something out. All if None."""
    probe: int = 1000
    """How many of the held-out images dead neurons are counted on."""

    # --- training ---
    epochs: int = 10
    """Epochs of each training."""
    finetune_epochs: int | None = None
    """Epochs of the trainings after a pruning where --rewind none; as --epochs if not given."""
    batch_size: int = 64
    """Images a step; an incomplete last batch of an epoch is left out."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer; a fresh one for each training."""
    lr: float = 0.1
    """The learning rate, after the warm-up."""
    finetune_lr: float | None = None
    """The learning rate of the trainings after a pruning where --rewind none; as --lr if not given."""
    momentum: float = 0.9
    """Momentum of SGD, the first beta of Adam."""
    nesterov: bool = False
    """Nesterov's momentum, for SGD."""
    weight_decay: float = 5e-4
    """Weight decay; activations' own parameters have none."""
    schedule: Literal["constant", "steps", "cosine", "linear"] = "constant"
    """What the learning rate does after the warm-up: stays, drops at the milestones, or falls to 0 at the end."""
    warmup: str = "0ep"
    """Linear warm-up from 0, in steps or epochs: 20000it, 1ep."""
    milestones: tuple[str, ...] = ()
    """For the schedule `steps`: when the rate is multiplied by gamma, also if the warm-up is not over: 25ep 32ep."""
    gamma: float = 0.1
    """The factor at each milestone."""
    augment: Literal["data", "none", "crop-flip", "resized-crop"] = "data"
    """What training does to images: what the data set says, nothing, crops (padding 4) or resized crops, mirroring."""
    crop_area: float = 0.08
    """The smallest share of an image that such a crop of random size shows."""
    cutout: int = 0
    """The side in pixels of a square blanked in each training image, anywhere; 0 for none."""
    mixup: float = 0.0
    """Alpha: each training image is mixed with another one by a share from Beta(alpha, alpha); 0 for none."""
    label_smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""
    clip_norm: float | None = None
    """Gradients of the living weights are scaled down to this norm where theirs is larger; never if None."""
    ema: float | None = None
    """Decay per step of a running mean of the weights, such as 0.999, which is what is kept of each training."""
    accumulate: int = 1
    """Each step's images go through the network in this many parts: the same step in less memory."""
    recover: int = 0
    """How often a training that diverges may go back to its last good epoch with a smaller learning rate."""
    recover_factor: float = 0.5
    """The learning rate is multiplied by this at each recovery."""

    # --- how it is computed ---
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward pass computes in; auto is bfloat16 (autocast) on a GPU that has it, else float32."""
    step: Literal["auto", "eager", "captured"] = "auto"
    """How steps are made: call by call, or captured in a CUDA graph and replayed; auto captures on a GPU."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Read images from disk as they are needed instead of keeping them on the device; auto: if they are too many."""
    compile: bool = False
    """Compile the model for training with torch.compile, which takes minutes; the counting of dead neurons with it."""
    deterministic: bool = False
    """Only deterministic algorithms, also on a GPU (a CPU is deterministic anyway)."""
    threads: int | None = None
    """CPU threads of each run, which the last bits of the results depend on; shared out among the runs if None."""
    monitor_every: int = 50
    """Dead neurons during training are counted in every n-th step, for TensorBoard; 0 for never."""
    sync_batchnorm: bool = False
    """Under torchrun on GPUs: BatchNorm normalises over the images of all processes instead of each one's own."""

    def __post_init__(self) -> None:
        for field in ("ap", "milestones"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.ap:
            raise ValueError("--ap: name at least one arm, for example none lite")
        arms = [str(Arm.parse(text)) for text in self.ap]
        if len(set(arms)) < len(arms):
            raise ValueError(f"--ap names an arm twice: {' '.join(self.ap)}")
        object.__setattr__(self, "ap", tuple(arms))
        self._check_numbers()
        self._check_names()

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and abs(value) >= 2**63:  # whole numbers that no float can hold, among others
                raise ValueError(f"--{_option(field.name)} must be {2**63 - 1:,} or less, not {value:,}")
        for name in ("seeds", "epochs", "batch_size", "score_batches", "probe", "accumulate"):
            _at_least(name, getattr(self, name), 1)
        for name in ("cycles", "first_seed", "monitor_every", "cutout", "recover"):
            _at_least(name, getattr(self, name), 0)
        for name in ("threads", "finetune_epochs", "train_images", "score_size"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"--{_option(name)} must be {most:,} or less, not {value:,}")
        if self.image_size is not None:
            _at_least("image_size", self.image_size, 1)
        if not 0 < self.width <= 64:
            raise ValueError(f"--width must be above 0 and at most 64, not {self.width}")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"--crop-area must be in (0, 1], not {self.crop_area}")
        if not 0 < self.amount < 1:
            raise ValueError(f"--amount must be in (0, 1), not {self.amount}")
        if any(arm.variant in ("lite", "pro") for arm in self.arms):
            if not 0 < self.rate < 1:
                raise ValueError(f"--rate must be in (0, 1), not {self.rate}")
            split(1, self.amount, self.rate)
        for name in ("lr", "finetune_lr", "gamma", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{_option(name)} must be a positive number, not {value}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{_option(name)} must be in [0, 1), not {getattr(self, name)}")
        for name in ("weight_decay", "mixup"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{_option(name)} must be 0 or more, not {value}")
        for name in ("ema", "recover_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"--{_option(name)} must be in (0, 1), not {value}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("--nesterov needs --optimizer sgd and a momentum")
        if self.val is not None and not (
            0 <= self.val < 1 or (1 <= self.val < math.inf and float(self.val).is_integer())
        ):
            raise ValueError(f"--val must be a share in [0, 1) or a number of images, not {self.val}")
        if self.milestones and self.schedule != "steps":
            raise ValueError(f"--milestones belong to --schedule steps, not {self.schedule}")
        Span.parse(self.warmup, "--warmup")
        for text in self.milestones:
            Span.parse(text, "--milestones")
        try:
            Rewind.parse(self.rewind, 1)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if (self.finetune_epochs is not None or self.finetune_lr is not None) and self.rewind != "none":
            raise ValueError("--finetune-epochs and --finetune-lr belong to --rewind none")

    def _check_names(self) -> None:
        object.__setattr__(self, "model", models.resolve(self.model))
        if self.pruner not in pruners.names():
            raise unknown("pruner", self.pruner, pruners.names())
        if ":" not in self.model and self.model not in models.names():
            raise models.unknown_model(self.model)
        if not self.data_is_folder and self.data not in data_sets.names():
            raise unknown("data set", self.data, [*data_sets.names(), "a folder"])
        if self.activation is not None and self.activation not in ap.activations.names():
            raise unknown("activation", self.activation, ap.activations.names())

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms, parsed."""
        return tuple(Arm.parse(text) for text in self.ap)

    @property
    def seed_list(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def places(self) -> str | list[str]:
        """Where AP removes weights, as `AP(where=...)` takes it."""
        return self.where if self.where in ("all", "rectified") else self.where.split(",")

    @property
    def data_is_folder(self) -> bool:
        """Whether `data` is a path instead of a name."""
        return "/" in self.data or "\\" in self.data or self.data in (".", "..")

    def trainings(self, arm: Arm) -> int:
        """How many trainings one run of an arm makes, if AP does not run out of candidates."""
        return 1 + self.cycles * (2 if arm.variant == "pro" else 1)

    def training_epochs(self, cycle: int) -> int:
        """Epochs of the trainings of this cycle."""
        fine = self.rewind == "none" and cycle > 0 and self.finetune_epochs is not None
        return self.finetune_epochs if fine and self.finetune_epochs is not None else self.epochs

    def training_lr(self, cycle: int) -> float:
        """The learning rate of the trainings of this cycle."""
        fine = self.rewind == "none" and cycle > 0 and self.finetune_lr is not None
        return self.finetune_lr if fine and self.finetune_lr is not None else self.lr

    def epochs_before(self, arm: Arm, cycle: int, phase: str = "train") -> int:
        """Epochs of the trainings that come before this one in a run of an arm.

        >>> config, pro = Experiment(epochs=10), Arm.parse("pro")
        >>> [config.epochs_before(pro, cycle, phase) for cycle in (0, 1) for phase in ("train", "retrain")]
        [0, 10, 20, 30]
        """
        each = 2 if arm.variant == "pro" else 1
        first = self.training_epochs(cycle) if phase == "retrain" else 0
        return each * sum(map(self.training_epochs, range(cycle))) + first

    def total_epochs(self, arm: Arm) -> int:
        """Epochs of one run of an arm, all its trainings together (a rewind to a step saves a part of them)."""
        return self.epochs_before(arm, self.cycles) + self.training_epochs(self.cycles)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as they are saved."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Experiment:
        """What `to_dict` gave; ValueError for fields that this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        odd = sorted(set(saved) - known)
        if odd:
            raise ValueError(f"the saved configuration has settings that this version does not know: {', '.join(odd)}")
        return cls(**saved)


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two configurations, one short text each.

    >>> differences({"epochs": 2, "lr": 0.1}, {"epochs": 3, "lr": 0.1})
    ['epochs 2 there, 3 here']
    """
    return [
        f"{name} {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in [*saved, *(n for n in wanted if n not in saved)]
        if saved.get(name) != wanted.get(name)
    ]


def _option(name: str) -> str:
    return name.replace("_", "-")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"--{_option(name)} must be a whole number, {least} or more, not {value!r}")

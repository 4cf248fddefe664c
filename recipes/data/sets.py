"""What a loaded data set is: three sets of uint8 images with labels, and what normalises them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class DataError(ValueError):
    """A data set, or a file of one, that cannot be used; the message says which and what would be right."""


class MissingDataError(DataError, FileNotFoundError):
    """Files that are not there; the message says which to put where."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 [N, C, H, W] and their labels int64 [N]; its length is N."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def __repr__(self) -> str:
        return f"ImageSet({_counted(self)})"


def _counted(part: ImageSet) -> str:
    return f"{len(part):,} images of {' × '.join(map(str, part.images.shape[1:]))}" if len(part) else "no images"


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, split: `train` to learn from, `val` for every choice, `test` for the final number only.

    `mean` and `std`, one a channel, are those of the training part, in the units of the stored bytes (0…255; the
    digits' are 0…16). `augment` names what training may do to an image ("none" or "crop-flip"); `val` and `test` are
    never augmented. `val` is empty when nothing is held out.

    >>> from recipes.data import load
    >>> load("digits")
    ImageData('digits': 1,200 images of 1 × 8 × 8 to train on, 200 held out, 397 to test, 10 classes)
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"

    def __repr__(self) -> str:
        sizes = f"{_counted(self.train)} to train on, {len(self.val):,} held out, {len(self.test):,} to test"
        return f"ImageData({self.name!r}: {sizes}, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """Height, which is also the width, in pixels."""
        return int(self.train.images.shape[-1])

    def with_train_images(self, count: int) -> ImageData:
        """The same with the first `count` training images only, which have each class in its share.

        Raises DataError if there are fewer.
        """
        if not 1 <= count <= len(self.train):
            raise DataError(f"{self.name}: --train-images must be 1 to {len(self.train):,}, not {count:,}")
        part = ImageSet(self.train.images[:count], self.train.labels[:count])
        return replace(self, train=part)

    def non_negative(self) -> ImageData:
        """The same, but normalised to [0, 1] instead of zero mean and unit variance.

        What Activate-while-Pruning argues, that a negative weight can only push a neuron down, holds for inputs that
        are not negative: for the first layer, that is for such images only.

        >>> from recipes.data import load
        >>> digits = load("digits").non_negative()
        >>> x = digits.normalise(digits.train.images)
        >>> x.min().item(), x.max().item()
        (0.0, 1.0)
        """
        brightest = float(self.train.images.max()) or 1.0
        return replace(self, mean=(0.0,) * self.in_channels, std=(brightest,) * self.in_channels)

    def shrunk(self, size: int) -> ImageData:
        """The same with smaller images, for slow machines: each pixel becomes the mean of the block it stands for.

        The side that the images have must be a multiple of `size`; mean and deviation are measured anew.

        Raises DataError for another size.

        >>> from recipes.data import load
        >>> tuple(load("digits").shrunk(4).train.images.shape)
        (1200, 1, 4, 4)
        """
        side = self.image_size
        if size < 1 or side % size:
            sizes = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise DataError(f"{self.name}: images of {side} pixels can be shrunk to {sizes}, not to {size}")
        train, val, test = (_shrink(part, side // size) for part in (self.train, self.val, self.test))
        mean, std = statistics(moments(train.images.numpy()), size * size)
        return replace(self, train=train, val=val, test=test, mean=mean, std=std)

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [N, C, H, W] to zero mean and unit variance a channel, on the images' device.

        >>> from recipes.data import load
        >>> digits = load("digits")
        >>> x = digits.normalise(digits.train.images)
        >>> abs(round(x.mean().item(), 3)), round(x.std().item(), 3)
        (0.0, 1.0)
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().sub_(mean).div_(std).to(dtype)


def _shrink(images: ImageSet, factor: int) -> ImageSet:
    small = [F.avg_pool2d(part.float(), factor).round_().to(torch.uint8) for part in images.images.split(4096)]
    return ImageSet(torch.cat(small), images.labels)


def stratified_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A fixed shuffled order [N] whose every beginning has each class in its share, to within one image.

    Images are shuffled within their class and then dealt out evenly: the r-th of a class of n comes at (r + ½) / n.
    So a validation set of any size is the beginning of the training images, and a smaller one is part of a larger.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> np.bincount(labels[stratified_order(labels)[:3]]).tolist()
    [2, 1]
    """
    # The legacy generator: the one whose stream NumPy promises never to change, so the split is the same for ever.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (rank + 0.5) / np.repeat(counts, counts)
    # Classes of one size tie at every rank: the shuffle decides, or low classes would always come first.
    return by_class[np.lexsort((np.argsort(shuffled)[by_class], place))]


def moments(images: np.ndarray) -> np.ndarray:
    """Sum and sum of squares of each image's channels: uint8 [N, C, H, W] to int64 [N, C, 2], exact."""
    wide = images.reshape(*images.shape[:2], -1).astype(np.uint32)
    return np.stack([wide.sum(-1, dtype=np.int64), np.square(wide).sum(-1, dtype=np.int64)], axis=-1)


def statistics(moments: np.ndarray, pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel from `moments` [N, C, 2] of images of `pixels` = H · W each.

    A channel without variance gets the deviation 1, so that it can be divided by.
    """
    count = len(moments) * pixels
    first, second = (int_sum.tolist() for int_sum in moments.sum(0).T)
    means = tuple(a / count for a in first)
    # In whole numbers until the division: the difference of two large floats would lose digits.
    variances = ((b * count - a * a) / count**2 for a, b in zip(first, second, strict=True))
    return means, tuple(variance**0.5 or 1.0 for variance in variances)


@dataclass(frozen=True, eq=False)
class Whole:
    """A data set before a validation set is held out: training images in `stratified_order`, with their `moments`."""

    classes: tuple[str, ...]
    train: ImageSet
    moments: np.ndarray
    test: ImageSet

    def split(self, name: str, val: int | float, augment: str) -> ImageData:
        """Holds the first training images out: `val` of them (int), or that share (float). Nothing is copied."""
        total = len(self.train)
        share = isinstance(val, float)
        allowed = not isinstance(val, bool) and 0 <= val < (1 if share else total)  # NaN is not
        held = round(val * total if share else val) if allowed else total
        if held >= total:
            raise DataError(
                f"{name}: val={val!r} cannot be held out of {total} training images: give a number of images from 0 "
                f"to {total - 1}, or a share in [0, 1)"
            )
        images, labels = self.train.images, self.train.labels
        mean, std = statistics(self.moments[held:], images.shape[-1] * images.shape[-2])
        return ImageData(
            name=name,
            train=ImageSet(images[held:], labels[held:]),
            val=ImageSet(images[:held], labels[:held]),
            test=self.test,
            classes=self.classes,
            mean=mean,
            std=std,
            augment=augment,
        )

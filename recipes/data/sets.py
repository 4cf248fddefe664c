"""What a loaded data set is: three sets of uint8 images with labels, and what normalises them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
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


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, split: `train` to learn from, `val` for every choice, `test` for the final number only.

    `mean` and `std`, one a channel, are those of the training part, in the units of the stored bytes (0…255; the
    digits' are 0…16). `augment` names what training may do to an image ("none" or "crop-flip"); `val` and `test` are
    never augmented.
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """Height, which is also the width, in pixels."""
        return int(self.train.images.shape[-1])

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
    # Ties between classes of equal size are broken by the shuffle, or low classes would always come first.
    return by_class[np.lexsort((np.argsort(shuffled)[by_class], place))]


def hold_out(name: str, total: int, val: int | float) -> int:
    """How many of `total` training images are held out: `val` images (int), or that share of them (float)."""
    count = round(val * total) if isinstance(val, float) else val
    if isinstance(val, bool) or not 0 <= count < total or (isinstance(val, float) and not 0 <= val < 1):
        raise DataError(
            f"{name}: val={val!r} cannot be held out of {total} training images: give a number of images from 0 to "
            f"{total - 1}, or a share in [0, 1)"
        )
    return count


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of uint8 images [N, C, H, W], one a channel, exact: counted, not accumulated.

    A channel without variance gets the deviation 1, so that it can be divided by.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.zeros(256, dtype=torch.int64)
        for part in channel.split(4096):  # bounds the extra memory of bincount, which widens to int64
            counts += torch.bincount(part.reshape(-1), minlength=256)
        share = counts.double() / counts.sum()
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum().sqrt()
        means.append(float(mean))
        stds.append(float(std) or 1.0)
    return tuple(means), tuple(stds)


def assemble(
    name: str,
    train: ImageSet,
    test: ImageSet,
    classes: tuple[str, ...],
    val: int | float,
    augment: str,
) -> ImageData:
    """Holds the first images of `train`, which is in `stratified_order`, out for validation. Nothing is copied."""
    held = hold_out(name, len(train), val)
    kept = ImageSet(train.images[held:], train.labels[held:])
    mean, std = statistics(kept.images)
    return ImageData(
        name=name,
        train=kept,
        val=ImageSet(train.images[:held], train.labels[:held]),
        test=test,
        classes=classes,
        mean=mean,
        std=std,
        augment=augment,
    )

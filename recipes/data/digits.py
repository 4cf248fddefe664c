"""The 1,797 handwritten digits that come with the package: 8 × 8 pixels, values 0…16 (see digits.txt)."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from recipes.data.sets import ImageData, ImageSet, assemble, stratified_order

TEST = 397  # leaves 1,400: 1,200 to train on and 200 to validate with


def load_digits(val: int | float) -> ImageData:
    """Splits the digits into 1,200 to train on, 200 to validate with (unless `val` differs) and 397 to test on.

    The file has no split of its own: the images are shuffled once, stratified, with a fixed seed; the first 397 are
    the test set, and the next ones the validation set. Images of one writer may be on both sides.
    """
    with files("recipes.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        images, labels = stored["images"], stored["labels"].astype(np.int64)
    order = stratified_order(labels)
    every = ImageSet(torch.from_numpy(images[order])[:, None], torch.from_numpy(labels[order]))
    return assemble(
        "digits",
        train=ImageSet(every.images[TEST:], every.labels[TEST:]),
        test=ImageSet(every.images[:TEST], every.labels[:TEST]),
        classes=tuple("0123456789"),
        val=val,
        augment="none",
    )

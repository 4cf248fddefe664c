"""The 1,797 handwritten digits that come with the package: 8 × 8 pixels, values 0…16 (see digits.txt)."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from recipes.data.sets import ImageSet, Whole, moments, stratified_order

TEST = 397  # leaves 1,400: 1,200 to train on and 200 to validate with
VAL = 200


def load_digits() -> Whole:
    """397 digits to test on and 1,400 to train on, of which the first 200 are held out unless told otherwise.

    The file has no split of its own: the images are shuffled once, stratified, with a fixed seed; the first 397 are
    the test set. Images of one writer may be on both sides.
    """
    with files("recipes.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        images, labels = stored["images"][:, None], stored["labels"].astype(np.int64)
    order = stratified_order(labels)
    images, labels = images[order], labels[order]
    return Whole(
        classes=tuple("0123456789"),
        train=ImageSet(torch.from_numpy(images[TEST:]), torch.from_numpy(labels[TEST:])),
        moments=moments(images[TEST:]),
        test=ImageSet(torch.from_numpy(images[:TEST]), torch.from_numpy(labels[:TEST])),
    )

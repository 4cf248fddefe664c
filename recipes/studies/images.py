"""The data that studies train on, as normalised tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from recipes import data


@dataclass(frozen=True)
class Images:
    """Training, validation and test images [N, C, H, W], normalised, with their labels [N]."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    in_channels: int
    image_size: int

    def to(self, device: str) -> Images:
        """The same on another device."""
        train, val, test = ((x.to(device), y.to(device)) for x, y in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)


def load(name: str, train: int | None = None, test: int | None = None, val: int | None = None) -> Images:
    """The data set `name`, at most `train` training images and `test` validation and test images each.
    `val` training images are held out for validation; without it, as many as `recipes.data.load` does.

    The files are looked for as `recipes.data.load` does; the digits need none.
    """
    whole = data.load(name, val=val)

    def part(images: data.sets.ImageSet, limit: int | None) -> tuple[Tensor, Tensor]:
        return whole.normalise(images.images[:limit]), images.labels[:limit].clone()

    return Images(
        part(whole.train, train),
        part(whole.val, test),
        part(whole.test, test),
        whole.num_classes,
        whole.in_channels,
        whole.image_size,
    )

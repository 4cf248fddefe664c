"""A data set that stays on the device, as bytes, and is augmented there.

The order of the images and all of their augmentation depend on the seed and the epoch only, so that all arms of a seed
see the same, however the images of a step are split over micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.data import ImageData, ImageSet

PADDING = 4  # of random crops, as in the published CIFAR recipes
EVAL_BATCH = 1000


def derived_seed(*numbers: int) -> int:
    """One well-mixed seed from several numbers.

    >>> derived_seed(0, 1) == derived_seed(0, 1), derived_seed(0, 1) == derived_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def crop_boxes(count: int, least_area: float, generator: torch.Generator) -> Tensor:
    """Boxes for `Plan.boxes`, as usual for ImageNet (Szegedy et al. 2015), half of them mirrored: float32 [4, count].

    The area is uniform between `least_area` and the whole image, the sides' ratio log-uniform between 3/4 and 4/3; of
    ten draws the first that fits counts, and the whole image if none does.
    """
    area = least_area + (1 - least_area) * torch.rand(10, count, generator=generator)
    ratio = torch.exp((2 * torch.rand(10, count, generator=generator) - 1) * math.log(4 / 3))
    height, width = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = (height <= 1) & (width <= 1)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    sides = torch.cat([side.gather(0, first) for side in (height, width)])
    sides = torch.where(fits.any(0), sides, 1.0)
    middles = (1 - sides) * (2 * torch.rand(2, count, generator=generator) - 1)
    sides[1] *= 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    return torch.cat([middles, sides])


@dataclass(frozen=True)
class Plan:
    """One epoch, drawn on the CPU.

    Attributes:
        order: which image is at each position, [N].
        offsets: top, left and mirroring of each position, [3, N].
        boxes: what is cut out of each position and stretched to a whole image, float32 [4, N]: the box's middle (y, x)
            and half of its height and width, the image reaching from −1 to 1; a negative width mirrors it.
        holes: row and column of the top left corner of each position's cut-out, [2, N]; it may lie outside.
        partners: the position that each one is mixed with, [N].
        shares: how much of the mixture is the partner, float32 in [0, 1], [N].
    """

    order: Tensor
    offsets: Tensor | None = None
    boxes: Tensor | None = None
    holes: Tensor | None = None
    partners: Tensor | None = None
    shares: Tensor | None = None

    def part(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """What says which images positions start … stop get, and how they are augmented: see `Resident.gather`."""
        own = self._at(slice(start, stop))
        if self.partners is None or self.shares is None:
            return own
        return (*own, *self._at(self.partners[start:stop]), self.shares[start:stop])

    def _at(self, positions: slice | Tensor) -> tuple[Tensor, ...]:
        return (
            self.order[positions],
            *(t[:, positions] for t in (self.offsets, self.boxes, self.holes) if t is not None),
        )


class Resident:
    """Images on the device as bytes, [N, H, W, C] so that a batch comes out in channels_last without a copy.

    Args:
        images: the set.
        data: where it is from; its mean and deviation normalise each batch.
        device: where it is to stay.
        augment: "none", "crop-flip", or "resized-crop".
        crop_area: the smallest share of an image's area that a resized crop may show.
        cutout: the side in pixels of a square that is blanked (DeVries & Taylor 2017), centred anywhere in the image
            and so partly outside of it at times; 0 for none.
        mixup: alpha: each image, and its label, is mixed with another one of the epoch, by a share from
            Beta(alpha, alpha) (Zhang et al. 2018); 0 for none.
    """

    def __init__(
        self,
        images: ImageSet,
        data: ImageData,
        device: torch.device,
        augment: str = "none",
        cutout: int = 0,
        mixup: float = 0.0,
        crop_area: float = 0.08,
    ) -> None:
        self.augment, self.cutout, self.mixup, self.crop_area = augment, cutout, mixup, crop_area
        self.size, self.device = data.image_size, device
        self._hold(images)
        self.mean = torch.tensor(data.mean, device=device)
        self.scale = 1 / torch.tensor(data.std, device=device)
        self.mean_row, self.scale_row = self.mean.repeat(self.size), self.scale.repeat(self.size)
        self.range = torch.arange(self.size, device=device)
        self.kinds = torch.arange(data.num_classes, device=device)
        self.middles = (2 * self.range + 1) / self.size - 1  # of the pixels, the image reaching from −1 to 1

    def _hold(self, images: ImageSet) -> None:
        self.images = self._laid_out(images.images).to(self.device)
        self.labels = images.labels.to(self.device)

    def _laid_out(self, pixels: Tensor) -> Tensor:
        """Bytes [n, C, H, W] as [n, H, W, C], with the margin that random crops need."""
        pixels = pixels.permute(0, 2, 3, 1).contiguous()
        margin = (0, 0, PADDING, PADDING, PADDING, PADDING)
        return F.pad(pixels, margin) if self.augment == "crop-flip" else pixels

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def epoch(self, seed: int, epoch: int) -> Plan:
        """The order and the augmentation of one epoch. Drawn on the CPU: the same on every device."""
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch, 1))
        count = len(self)
        parts: dict[str, Tensor] = {"order": torch.randperm(count, generator=generator)}
        if self.augment == "crop-flip":
            offsets = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator)
            mirrored = torch.randint(0, 2, (1, count), generator=generator)
            parts["offsets"] = torch.cat([offsets, mirrored])
        elif self.augment == "resized-crop":
            parts["boxes"] = crop_boxes(count, self.crop_area, generator)
        # Each with a generator of its own, so that an option does not change what the others draw.
        if self.cutout:
            generator.manual_seed(derived_seed(seed, epoch, 4))
            parts["holes"] = torch.randint(0, self.size, (2, count), generator=generator) - self.cutout // 2
        if self.mixup:
            drawn = np.random.default_rng(derived_seed(seed, epoch, 5))
            parts["partners"] = torch.from_numpy(drawn.permutation(count))
            parts["shares"] = torch.from_numpy(drawn.beta(self.mixup, self.mixup, count).astype(np.float32))
        return Plan(**{name: part.to(self.labels.device) for name, part in parts.items()})

    def batch(self, plan: Plan, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positions start … stop of the epoch: images float32 [n, C, H, W] (channels_last), and labels int64 [n].

        With mixup the labels are the classes' shares, float32 [n, classes], which the cross-entropy takes as well.
        """
        return self.gather(*self.part(plan, start, stop))

    def part(self, plan: Plan, start: int, stop: int) -> tuple[Tensor, ...]:
        """What `gather` makes positions start … stop of the epoch from; the batch is each tensor's last dimension."""
        return plan.part(start, stop)

    def gather(self, *part: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels that a part of this set's plan stands for.

        Tensor operations of fixed sizes only: they can be captured in a graph.
        """
        if not self.mixup:
            return self._augmented(*part)
        half = len(part) // 2
        share = part[-1]
        images, labels = self._augmented(*part[:half])
        others, other_labels = self._augmented(*part[half:-1])
        own, other = ((of[:, None] == self.kinds).float() for of in (labels, other_labels))
        return images.lerp(others, share[:, None, None, None]), own.lerp(other, share[:, None])

    def _augmented(self, index: Tensor, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        return self._drawn(self.images, index, *drawn), self.labels[index]

    def _drawn(self, images: Tensor, index: Tensor, *drawn: Tensor) -> Tensor:
        if self.augment != "crop-flip":
            pixels = images.index_select(0, index)
        else:
            top, left, mirrored = drawn[0]
            height, width, channels = images.shape[1:]
            rows = index[:, None] * height + top[:, None] + self.range
            columns = torch.where(mirrored[:, None] == 1, self.size - 1 - self.range, self.range) + left[:, None]
            # On a CPU a third of the time that images[index, rows, columns] takes.
            places = (rows[:, :, None] * width + columns[:, None, :]).flatten()
            pixels = images.view(-1, channels).index_select(0, places).view(-1, self.size, self.size, channels)
        found = self._normalised(pixels)
        if self.augment == "resized-crop":
            found = self._stretched(found, drawn[0])
        if self.cutout:
            inside = self.range - drawn[-1][:, :, None]  # [2, n, H or W], counted from the hole's corner
            rows, columns = (inside >= 0) & (inside < self.cutout)
            found.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)  # the mean pixel
        return found

    def _stretched(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Bilinear: a crop of an image of the same size is never shrunk, so that nothing needs to be averaged."""
        y, x, height, width = boxes[:, :, None]  # [n, 1] each
        rows, columns = y + height * self.middles, x + width * self.middles
        grid = torch.stack(
            [columns[:, None, :].expand(-1, self.size, -1), rows[:, :, None].expand(-1, -1, self.size)], dim=-1
        )
        stretched = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return stretched.contiguous(memory_format=torch.channels_last)

    def plain(self, which: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Images without augmentation, and labels."""
        pixels = self.images[which]
        if self.augment == "crop-flip":
            pixels = pixels[:, PADDING : PADDING + self.size, PADDING : PADDING + self.size]
        return self._normalised(pixels), self.labels[which]

    def batches(
        self, size: int = EVAL_BATCH, limit: int | None = None, every: int = 1, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images (or the first `limit`) in order, without augmentation; every so many-th batch from the first."""
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(first * size, count, every * size):
            yield self.plain(slice(start, min(start + size, count)))

    def _normalised(self, pixels: Tensor) -> Tensor:
        count, height, width, channels = pixels.shape
        found = pixels.float().contiguous()
        # A row of pixels at a time: to spread three numbers over the last axis takes a CPU ten times as long.
        rows = found.view(count, height, width * channels)
        rows.sub_(self.mean if channels == 1 else self.mean_row).mul_(self.scale if channels == 1 else self.scale_row)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

"""torch.nn.utils.prune: masks from its `weight_mask` buffers, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import prune

if TYPE_CHECKING:
    from ap.masks import Masks


def check_pruned(masks: Masks) -> None:
    """Raises ValueError when torch.nn.utils.prune has masked none of these weights."""
    if not any(slot.torch_prune_mask() is not None for slot in masks._slots.values()):
        raise ValueError(
            f"torch.nn.utils.prune has masked none of the {len(masks)} weights of this {type(masks.model).__name__}: "
            "use Masks(model), or Masks.from_zeros(model) after prune.remove()"
        )


def to_torch_prune(masks: Masks) -> nn.Module:
    """Gives every masked weight torch.nn.utils.prune's `weight_orig` and `weight_mask`; returns the model.

    Parameters stay the same objects, so optimizers go on. A weight that several layers share is masked in each of them.
    """
    masks.apply_()  # layers that are masked already get the new mask here
    for name, slot in masks._slots.items():
        if slot.torch_prune_mask() is not None:
            continue
        parameter, mask = slot.parameter(), masks[name].to(slot.parameter().dtype)
        holders = [
            (module, key)
            for module in masks.model.modules()
            for key, held in module._parameters.items()
            if held is parameter
        ]
        for module, key in holders:
            prune.custom_from_mask(module, key, mask)
    return masks.model

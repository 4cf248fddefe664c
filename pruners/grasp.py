"""GraSP: keep what preserves the gradient's flow (Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ap.graph_trace import unwrap
from ap.masks import Masks
from ap.ranks import reduce_over_ranks
from pruners.base import (
    Batches,
    LossFn,
    Pruner,
    on_device,
    register,
    repeatable,
    summed_gradients,
    undisturbed,
)

TEMPERATURE = 200.0  # the published constant, which the logits are divided by


@register("grasp")
class GraSP(Pruner):
    """w · (H g): removing the lowest raises the gradient's norm most. In evaluation mode, usually at initialisation.

    Args:
        temperature: what the logits are divided by.
    """

    needs_data = True

    def __init__(self, temperature: float = TEMPERATURE) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature

    def scores(
        self, model: nn.Module, masks: Masks, batches: Batches | None = None, loss_fn: LossFn | None = None
    ) -> Mapping[str, Tensor]:
        """w · (H g) over all batches, g the gradient and H the Hessian of the loss (Wang et al. 2020, equation 8)."""
        given, loss = self.require_data(batches, loss_fn)
        given = repeatable(given)

        def cooled(outputs: Tensor, targets: Tensor) -> Tensor:
            return loss(outputs / self.temperature, targets)

        try:
            return self._products(model, masks, given, cooled)
        except RuntimeError as error:
            if "not implemented" not in str(error) and "not differentiable" not in str(error):
                raise
            raise ValueError(f"grasp differentiates twice, which a part of this model cannot: {error}") from error

    def _products(self, model: nn.Module, masks: Masks, given: Batches, cooled: LossFn) -> dict[str, Tensor]:
        """w · (H g), H g by a second backward pass through g · ∂L/∂w, batch by batch."""
        fixed = summed_gradients(model, masks, given, cooled)
        weights = {name: masks.weight(name) for name in masks}
        products = {name: torch.zeros_like(gradient) for name, gradient in fixed.items()}
        # Attention's fused kernels cannot be differentiated twice.
        model = unwrap(model)
        with undisturbed(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for inputs, targets in on_device(given, model):
                value = cooled(model(inputs), targets)
                gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
                along = torch.zeros((), device=value.device)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        along = along + (gradient * fixed[name]).sum()
                if not along.requires_grad:
                    continue
                second = torch.autograd.grad(along, list(weights.values()), allow_unused=True)
                for name, product in zip(weights, second, strict=True):
                    if product is not None:
                        products[name] += product
        reduce_over_ranks(products.values())
        return {name: weights[name].detach() * product for name, product in products.items()}

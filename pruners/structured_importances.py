"""torch-pruning's importances as pruners: magnitude, BatchNorm scale, Taylor, Hessian, LAMP on channels, random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pruners.base import Batches, LossFn, on_device, register
from pruners.structured import Structured, torch_pruning


@register("structured-magnitude")
class StructuredMagnitude(Structured):
    """The group's L2 norm, over the mean of its layer group (Li et al. 2017; Fang et al. 2023)."""

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """torch-pruning's GroupMagnitudeImportance."""
        return torch_pruning().importance.GroupMagnitudeImportance(p=2)


@register("structured-bn-scale")
class StructuredBNScale(Structured):
    """|γ| of BatchNorm (Liu et al. 2017); channels that no BatchNorm scales stay."""

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """torch-pruning's BNScaleImportance."""
        return torch_pruning().importance.BNScaleImportance()


@register("structured-lamp")
class StructuredLAMP(Structured):
    """LAMP's normalisation on the channels' squared norms (Lee et al. 2021; Fang et al. 2023)."""

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """torch-pruning's LAMPImportance."""
        return torch_pruning().importance.LAMPImportance()


@register("structured-taylor")
class StructuredTaylor(Structured):
    """|Σ w · ∂L/∂w| over each channel's weights (Molchanov et al. 2019), the gradient summed over all batches."""

    needs_data = True

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """torch-pruning's GroupTaylorImportance."""
        given, loss = self.require_data(batches, loss_fn)
        for inputs, targets in on_device(given, model):
            loss(model(inputs), targets).backward()
        return torch_pruning().importance.GroupTaylorImportance()


@register("structured-hessian")
class StructuredHessian(Structured):
    """w² · E[(∂L/∂w)²], the Hessian's diagonal by the squared gradients of single samples (LeCun et al. 1989)."""

    needs_data = True

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """torch-pruning's GroupHessianImportance."""
        given, loss = self.require_data(batches, loss_fn)
        squares = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
        samples = 0
        for inputs, targets in on_device(given, model):
            for i in range(len(targets)):
                model.zero_grad()
                loss(model(inputs[i : i + 1]), targets[i : i + 1]).backward()
                samples += 1
                for parameter, square in squares.items():
                    if parameter.grad is not None:
                        square += parameter.grad.square()
        # Summed here: the library's own accumulation keeps the last sample's only.
        for parameter, square in squares.items():
            parameter.grad = square / max(1, samples)
        return torch_pruning().importance.GroupHessianImportance()


@register("structured-random")
class StructuredRandom(Structured):
    """Uniform draws: the baseline.

    Args:
        seed: of the draws.
        options: as for all structured pruners.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed

    def importance(self, model: nn.Module, batches: Batches | None, loss_fn: LossFn | None) -> Any:
        """One draw a channel, the same ones for the same seed and groups."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(group: Any) -> Tensor:
            return torch.rand(len(group[0].idxs), generator=generator)

        return draw

"""torchvision's models for folders of images, with torchvision's own layer names, so that its weights fit."""

from __future__ import annotations

import functools

from torch import nn

import ap.activations
import ap.init
from recipes.models.registry import Request, register

MODELS = {"resnet18": "relu", "resnet50": "relu", "vgg16_bn": "relu", "vit_b_16": "gelu"}


def build(request: Request, model: str, published: str) -> nn.Module:
    """torchvision's `model`, with its initial weights; another activation than the `published` one is swapped in.

    The convolutional networks then get weights for it. A vision transformer keeps its own: LayerNorm sets the scale.
    Only its classifier, which torchvision starts at zero, is drawn: at zero it would hide all other layers from every
    score that is a gradient, and be the first to go where magnitudes are compared.
    """
    from torchvision import models

    if request.in_channels != 3:
        raise ValueError(f"in_channels must be 3, not {request.in_channels}: torchvision's models see colour images")
    if request.width != 1:
        raise ValueError(f"width must be 1, not {request.width}: torchvision's models come in one width")
    options = {}
    if model.startswith("vit"):
        if request.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16 pixels, not {request.image_size}")
        options["image_size"] = request.image_size
    else:
        request.at_least(32, "five halvings")
    made = models.get_model(model, weights=None, num_classes=request.num_classes, **options)
    if model.startswith("vit"):
        nn.init.trunc_normal_(made.heads.head.weight, std=made.heads.head.in_features**-0.5)
    if request.activation_name != published or request.activation_params:
        ap.activations.swap(made, request.activation_name, **request.activation_params)
        if not model.startswith("vit"):
            ap.init.initialize_(made, request.activation_name, **request.activation_params)
    return made


for name, activation in MODELS.items():
    register(f"torchvision/{name}", activation=activation, initialised=True)(
        functools.partial(build, model=name, published=activation)
    )

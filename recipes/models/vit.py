"""Small vision transformers for small images (Dosovitskiy et al. 2020).

Pre-norm, learned positions, and the mean over the tokens instead of a class token (Beyer et al. 2022). An image is cut
into 8 × 8 patches, whatever its size: 4 × 4 pixels each at 32 × 32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ap.init
from recipes.models.registry import Request, register

PATCHES = 8  # along each side


class Attention(nn.Module):
    """Self-attention over tokens [N, T, D] with all of its projections as linear layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """LayerNorm and attention, LayerNorm and two linear layers around the activation, each with a shortcut."""

    def __init__(self, request: Request, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = request.activation()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """Patches, `depth` encoder blocks, a linear classifier on the mean token. `width` scales the number of heads."""

    def __init__(self, request: Request, depth: int, heads: int, head_dim: int) -> None:
        super().__init__()
        if request.image_size % PATCHES:
            raise ValueError(f"image_size must be a multiple of {PATCHES} pixels, not {request.image_size}")
        heads = request.channels(heads)
        dim, patch = heads * head_dim, request.image_size // PATCHES
        self.patches = nn.Conv2d(request.in_channels, dim, patch, patch)
        self.position = nn.Parameter(torch.empty(1, PATCHES**2, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(request, dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, request.num_classes)
        self._initialise(ap.init.gain(request.activation_name, **request.activation_params))

    def _initialise(self, gain: float) -> None:
        """Unit variance in each branch: LayerNorm begins it, so that only `fc2` has the activation before it.

        The classifier too: started near zero, as usual, it would be the first to go where magnitudes are compared.
        """
        nn.init.trunc_normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                scale = gain if name.endswith("fc2") else 1.0
                nn.init.normal_(module.weight, std=scale / module.weight[0].numel() ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position  # [N, T, D]
        return self.fc(self.norm(self.blocks(x)).mean(1))


register("vit-tiny", activation="gelu", initialised=True)(functools.partial(SmallViT, depth=12, heads=3, head_dim=64))
register("vit-mini", activation="gelu", initialised=True)(functools.partial(SmallViT, depth=6, heads=4, head_dim=32))

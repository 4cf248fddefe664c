"""Moments of an activation of a normal variable, by dense quadrature: the studies' own, independent of `ap.init`."""

from __future__ import annotations

import torch
from torch import nn


def second_moment(activation: nn.Module, variance: float = 1.0) -> float:
    """E[f(z)²] for z ~ N(0, variance).

    >>> round(second_moment(nn.ReLU()), 6)
    0.5
    """
    z = torch.linspace(-12, 12, 240001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    with torch.no_grad():
        value = activation.double()(variance**0.5 * z)
    activation.float()
    return float(torch.trapezoid(value.square() * density, z))


def gain(activation: nn.Module) -> float:
    """1 / √E[f(z)²]: the weights' factor that keeps a signal's variance at 1."""
    return second_moment(activation) ** -0.5


def exponent(activation: nn.Module, step: float = 0.05) -> float:
    """d log q′ / d log q at q = 1, where q′ is the variance one layer later: above 1, deviations grow with depth."""
    high, low = (torch.tensor(second_moment(activation, q)).log() for q in (1 + step, 1 - step))
    spacing = torch.tensor(1 + step).log() - torch.tensor(1 - step).log()
    return float((high - low) / spacing)

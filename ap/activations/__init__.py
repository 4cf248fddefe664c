"""Activation functions: by name, as functions, with their dead ranges, and swapped into a model."""

from ap.activations import functional
from ap.activations.gated import GCU, Swish
from ap.activations.parameters import param_groups
from ap.activations.ranges import DeadRange, dead_range, gradient_dead_range, is_activation
from ap.activations.rectifiers import HeLU, PReLU, SquaredReLU, StarReLU
from ap.activations.registry import create, names, register, unregister
from ap.activations.smooth import RESCU, GSmeLU, SmeLU
from ap.activations.swapping import Swapped, swap

__all__ = [
    "GCU",
    "RESCU",
    "DeadRange",
    "GSmeLU",
    "HeLU",
    "PReLU",
    "SmeLU",
    "SquaredReLU",
    "StarReLU",
    "Swapped",
    "Swish",
    "create",
    "dead_range",
    "functional",
    "gradient_dead_range",
    "is_activation",
    "names",
    "param_groups",
    "register",
    "swap",
    "unregister",
]

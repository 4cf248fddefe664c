"""Activation functions: by name, as functions, with their dead ranges, and swapped into a model."""

from ap.activations.ranges import DeadRange, dead_range, gradient_dead_range, is_activation
from ap.activations.registry import create, names, register, unregister

__all__ = [
    "DeadRange",
    "create",
    "dead_range",
    "gradient_dead_range",
    "is_activation",
    "names",
    "register",
    "unregister",
]

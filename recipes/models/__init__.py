"""Models, each with any activation."""

from recipes.models import resnet, small  # noqa: F401  (they register their models)
from recipes.models.registry import Request, create, names, register

__all__ = ["Request", "create", "names", "register"]

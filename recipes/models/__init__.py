"""Models, each with any activation."""

from recipes.extras import needs_recipes

with needs_recipes("recipes.models"):
    # Importing a file registers its models.
    from recipes.models import densenet, mobilenet, published, resnet, small, vgg, vit  # noqa: F401
    from recipes.models.factories import load_factory
    from recipes.models.registry import Request, create, default_activation, names, register, resolve, unknown_model
    from recipes.models.weights import load_weights

__all__ = [
    "Request",
    "create",
    "default_activation",
    "load_factory",
    "load_weights",
    "names",
    "register",
    "resolve",
    "unknown_model",
]

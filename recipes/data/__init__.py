"""Data sets of images, small enough to stay in memory as bytes."""

from recipes.extras import needs_recipes

with needs_recipes("recipes.data"):
    from recipes.data.registry import load, names
    from recipes.data.sets import DataError, ImageData, ImageSet, MissingDataError

__all__ = ["DataError", "ImageData", "ImageSet", "MissingDataError", "load", "names"]

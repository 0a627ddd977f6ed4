"""Recipes: what a user writes, its schema, and what follows from it before anything is built."""

from megatron_carve.recipe.loading import Recipe, RecipeError, check_layout, load_recipe, recipe_names, written

__all__ = ["Recipe", "RecipeError", "check_layout", "load_recipe", "recipe_names", "written"]

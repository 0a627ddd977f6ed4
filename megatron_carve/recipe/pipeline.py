"""How layers are divided over pipeline stages, by what each costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

from megatron_carve.recipe import Recipe, estimate


def even_split(layers: Sequence[float], end: float, stages: int) -> list[int]:
    """Where to divide layers into stages so that the slowest is as fast as can be; of such ways an even one.

    Args:
        layers: what each costs, in order.
        end: what follows the last layer, in the same stage.
        stages: at most as many as layers; each gets one or more.

    Returns:
        Numbers of layers before each boundary, stages - 1 of them.
    """
    sums = [0.0]
    for cost in layers:
        sums.append(sums[-1] + cost)

    @functools.cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(the slowest of `left` stages from layer `first` on, their squares' sum, their boundaries)"""
        if left == 1:
            alone = sums[-1] - sums[first] + end
            return alone, alone**2, ()
        ways = []
        for boundary in range(first + 1, len(layers) - left + 2):
            cost = sums[boundary] - sums[first]
            slowest, squares, others = best(boundary, left - 1)
            ways.append((max(cost, slowest), cost**2 + squares, (boundary, *others)))
        return min(ways)

    return list(best(0, stages)[2])


def stage_costs(layers: Sequence[float], end: float, boundaries: Sequence[int]) -> list[float]:
    """What each stage costs; see even_split."""
    costs = [sum(layers[first:last]) for first, last in pairwise([0, *boundaries, len(layers)])]
    return [*costs[:-1], costs[-1] + end]


def better_pattern(recipe: Recipe, vocab_size: int) -> tuple[str, float, float] | None:
    """A pattern whose slowest stage takes fewer operations than the recipe's own.

    Returns:
        (the pattern, operations of its slowest stage over those of a mean one, the same of the recipe's pattern), or
        None if parallel.pipeline is 1 or the split is as good.
    """
    own, *heads = recipe.model.pattern.split("/")
    letters = own.replace("|", "")
    stages = own.split("|")
    if recipe.parallel.pipeline == 1:  # where boundaries mean nothing
        return None
    number = max(len(stages), recipe.parallel.pipeline)
    layers = [estimate.layer_flops_per_token(recipe, letter) for letter in letters]
    end = estimate.end_flops_per_token(recipe, vocab_size)
    if len(stages) == 1:  # Megatron gives every stage as many layers
        stages = [letters[i : i + len(letters) // number] for i in range(0, len(letters), len(letters) // number)]
    sizes = [len(stage) for stage in stages]
    now = stage_costs(layers, end, [sum(sizes[: i + 1]) for i in range(number - 1)])
    boundaries = even_split(layers, end, number)
    then = stage_costs(layers, end, boundaries)
    if max(then) >= max(now):
        return None
    parts = [letters[first:last] for first, last in pairwise([0, *boundaries, len(letters)])]
    mean = (sum(layers) + end) / number
    return "/".join(["|".join(parts), *heads]), max(then) / mean, max(now) / mean

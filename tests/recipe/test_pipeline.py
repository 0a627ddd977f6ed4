"""The division of layers over pipeline stages."""

import itertools
import random

import pytest

from megatron_carve import plan
from megatron_carve.recipe import estimate, load_recipe
from megatron_carve.recipe.pipeline import better_pattern, even_split, stage_costs

HYBRID = ["carve_1p3b_hybrid", "parallel.pipeline=4"]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_a_faster_slowest_stage(seed):
    draw = random.Random(seed)
    layers = [draw.choice([1.0, 2.5, 4.0]) for _ in range(draw.randint(4, 10))]
    end, stages = draw.choice([0.0, 3.0, 20.0]), draw.randint(1, 4)
    ways = itertools.combinations(range(1, len(layers)), stages - 1)
    least = min(max(stage_costs(layers, end, way)) for way in ways)
    found = even_split(layers, end, stages)
    assert max(stage_costs(layers, end, found)) == least
    assert sum(stage_costs(layers, end, found)) == pytest.approx(sum(layers) + end)


def test_of_ways_with_one_slowest_stage_an_even_one_is_taken():
    assert even_split([1, 1, 1, 1, 1, 1, 1], 4, 3) == [3, 6]  # the last stage is the slowest wherever the first ends
    assert even_split([1, 1, 1, 1], 9, 4) == [1, 2, 3]  # every stage has a layer


def test_the_output_takes_layers_off_the_last_stage():
    pattern, slowest, own = better_pattern(load_recipe(*HYBRID[:1], HYBRID[1:]), 32000)
    stages = pattern.split("|")
    assert "".join(stages) == load_recipe(HYBRID[0]).model.pattern
    assert len(stages) == 4 and len(stages[-1]) < 12
    assert 1 <= slowest < own
    assert better_pattern(load_recipe(HYBRID[0], [HYBRID[1], f"model.pattern='{pattern}'"]), 32000) is None


def test_layers_are_counted_as_in_the_whole_model():
    """With heads for further tokens, which are the last stage's."""
    recipe = load_recipe("debug", ["model.pattern=C-|*-/2-", "parallel.pipeline=2"])
    whole = estimate.forward_flops_per_token(recipe, 100)
    layers = [estimate.layer_flops_per_token(recipe, letter) for letter in "C-*-"]
    assert sum(layers) + estimate.end_flops_per_token(recipe, 100) == pytest.approx(whole)
    pattern, slowest, _ = better_pattern(recipe, 100)
    assert pattern == "C-*|-/2-"
    last = layers[3] + estimate.end_flops_per_token(recipe, 100)
    assert slowest == pytest.approx(2 * max(sum(layers[:3]), last) / whole)


@pytest.mark.parametrize(
    "words",
    [[], ["model.pattern=C|-*-"], ["parallel.pipeline=2", "model.pattern=----|--", "model.vocab_multiple=2816"]],
)
def test_nothing_is_proposed_for_one_stage_or_the_best_split(words):
    """On one stage boundaries mean nothing."""
    assert better_pattern(load_recipe("debug", words), 100) is None


def test_interleaved_stages_stay_as_many():
    words = ["parallel.pipeline=2", "model.pattern=C|-*-|C-C|-", "training.micro_batch_size=4"]
    pattern, _, _ = better_pattern(load_recipe("debug", words), 100)
    assert pattern.count("|") == 3


def test_plan_prints_a_pattern_that_a_recipe_takes(capsys):
    assert plan.main([*HYBRID, "--gpus", "4"]) == 0
    said = capsys.readouterr().out
    (line,) = (line.strip() for line in said.splitlines() if "model.pattern=" in line)
    assert "times what a mean one does" in said
    assert plan.main([*HYBRID, "--gpus", "4", line]) == 0
    assert "model.pattern=" not in capsys.readouterr().out

"""The token ids that a recipe's data has, and its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_carve.data.recall import RecallTask
from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.recipe import Recipe


def recall_task(recipe: Recipe) -> RecallTask | None:
    """The generated task that the recipe trains on; None where it trains on text."""
    if recipe.data.source != "recall":
        return None
    return RecallTask(seq_length=recipe.training.seq_length, **dataclasses.asdict(recipe.data.recall))


def vocab_size(recipe: Recipe, tokenizer: Path | None = None) -> int:
    """Token ids of the recipe's model, before padding; `tokenizer` is a run's copy of it."""
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size
    task = recall_task(recipe)
    return load_tokenizer(recipe.data.tokenizer, tokenizer).vocab_size if task is None else task.vocab_size

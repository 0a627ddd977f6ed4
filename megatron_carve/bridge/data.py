"""A recipe's data in Megatron-Bridge's training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from torch.distributed.distributed_c10d import _get_default_store

from megatron_carve.data.tokenizer import load_tokenizer
from megatron_carve.recipe import Recipe
from megatron_carve.run.data import prepared_blend, run_tokenizer
from megatron_carve.run.folder import RunFolder, keep_tokenizer
from megatron_carve.run.launch import on_first_process
from megatron_carve.run.task import Task
from megatron_carve.run.vocabulary import vocab_size


@dataclass(kw_only=True)
class RecipeData(DatasetProvider):
    """The samples that our own programs train on: of texts, prepared sets, or the generated task."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """All sections, as Recipe.to_dict gives them."""
    cache_path: str | None = None
    """Where Megatron keeps its index of samples."""

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """(train, validation, no test); texts are tokenised by one process, for which the others wait.

        The folder of recipe.run gets the recipe and the tokenizer, by which our own programs know a run.

        Raises:
            ValueError, OSError: what is wrong with the data, naming the recipe's key.
        """
        recipe = Recipe.from_dict(self.recipe)
        store, rank = _get_default_store(), torch.distributed.get_rank()
        on_first_process(store, rank, f"data of {recipe.run.path}", lambda: self._begin_run(recipe))
        task = Task(recipe, vocab_size(recipe), run_tokenizer(recipe).eod, prepared_blend(recipe))
        train, validation = task.splits(context.train_samples, context.valid_samples, self.cache_path, everywhere=True)
        return train, validation, None

    def _begin_run(self, recipe: Recipe) -> None:
        prepared_blend(recipe)
        run = RunFolder(recipe.run.path)
        if recipe.data.source != "recall" and not (run.tracker.exists() and run.tokenizer.exists()):
            keep_tokenizer(load_tokenizer(recipe.data.tokenizer), run.tokenizer)
        run.save_recipe(recipe)

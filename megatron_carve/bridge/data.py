"""A recipe's data in Megatron-Bridge's training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

from megatron_carve.recipe import Recipe
from megatron_carve.run.data import prepared_blend, run_tokenizer
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

        Raises:
            ValueError, OSError: what is wrong with the data, naming the recipe's key.
        """
        recipe = Recipe.from_dict(self.recipe)
        if torch.distributed.get_rank() == 0:
            prepared_blend(recipe)
        torch.distributed.barrier()
        task = Task(recipe, vocab_size(recipe), run_tokenizer(recipe).eod, prepared_blend(recipe))
        train, validation = task.splits(context.train_samples, context.valid_samples, self.cache_path)
        return train, validation, None

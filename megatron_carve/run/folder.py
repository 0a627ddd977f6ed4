"""A run's folder: where things are, and whether its checkpoint can be continued."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.recipe import Recipe, RecipeError, load_recipe, written

# Beginnings of Megatron arguments that change how a model is trained or watched, not what it is.
SAME_MODEL = [
    "recompute_",
    "fp8",
    "fp4",
    "log_",
    "wandb_",
    "tensorboard_",
    "timing_",
    "profile",
    "exit_",
    "num_workers",
    "nccl_",
    "overlap_",
    "tp_comm_",
    "cuda_graph",
    "attention_backend",
    "async_save",
    "ckpt_",
    "dist_ckpt",
    "distributed_timeout",
    "rerun_",
    "manual_gc",
    "empty_unused",
    "deterministic_mode",
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued. Nothing in its folder has been changed."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.recipe.with_suffix(".partial")
        partial.write_text("# The resolved recipe of this run.\n" + recipe.dump(), encoding="utf-8")
        os.replace(partial, self.recipe)

    def checkpoint_step(self) -> int | None:
        """The step of the newest finished checkpoint, or None if there is none.

        Raises:
            CheckpointError: the checkpoint that Megatron's tracker file names is not whole.
        """
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return None
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit():
            raise CheckpointError(f"{tracker}: expected the step of a checkpoint, got {text!r}")
        step = int(text)
        self.check_whole(step)
        return step

    def check_whole(self, step: int) -> None:
        """Raise CheckpointError unless the checkpoint of this step is there with every byte its index refers to."""
        _check_whole(self.checkpoints / f"iter_{step:07d}")

    def checkpoint_steps(self) -> list[int]:
        """Steps of all checkpoints that were begun here, whole or not."""
        return sorted(int(path.name.removeprefix("iter_")) for path in self.checkpoints.glob("iter_*[0-9]"))

    def require_no_checkpoint(self) -> None:
        """Raise CheckpointError if one was begun here."""
        if self.checkpoint_steps():
            raise CheckpointError(f"{self.checkpoints}: expected a run without checkpoints, but there is one")

    def saved_recipe(self) -> Recipe:
        """The recipe that the checkpoint here was trained with.

        Raises:
            CheckpointError: it is gone or cannot be read.
        """
        if not self.recipe.exists():
            raise CheckpointError(f"{self.checkpoints}: holds a checkpoint, but {self.recipe}, its recipe, is gone")
        try:
            if is_earlier_carve(written(self.recipe)):
                raise CheckpointError(f"{self.checkpoints}: the checkpoint is of {EARLIER_CARVE}")
            return load_recipe(str(self.recipe.resolve()))
        except RecipeError as error:
            raise CheckpointError(f"{self.recipe}: cannot tell which model the checkpoint is of: {error}") from None

    def check_same_model(self, recipe: Recipe) -> None:
        """Raise CheckpointError unless the checkpoint here is of the model that `recipe` describes."""
        theirs, ours = architecture(self.saved_recipe()), architecture(recipe)
        different = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]
        if different:
            listed = "; ".join(f"{k} is {theirs.get(k)!r} there and {ours.get(k)!r} here" for k in different)
            raise CheckpointError(
                f"{self.checkpoints}: the checkpoint is of another model ({listed}); choose another run.name, "
                "or change the recipe back"
            )


EARLIER_CARVE = (
    "CARVE as this package built it before the paper's text was known (its recipe has no mixer.erase): other gates and "
    "other parameters, which this version does not have; train it anew"
)


def is_earlier_carve(resolved: Mapping[str, Any]) -> bool:
    """Whether a resolved recipe, as it was written, is of when letter C was an earlier form of CARVE."""
    model, mixer = (resolved.get(section) for section in ("model", "mixer"))
    named = isinstance(model, Mapping) and "C" in str(model.get("pattern"))
    return named and not (isinstance(mixer, Mapping) and "erase" in mixer)


def architecture(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint of this recipe's model depends on, by recipe key; the parallel layout is not part of it."""
    values = recipe.to_dict()
    model = values["model"]
    for choice_of_implementation in ("layers", "mixer_backend", "mixer_recompute", "init_std"):
        del model[choice_of_implementation]
    model["pattern"] = model["pattern"].replace("|", "")
    flat = {f"model.{k}": v for k, v in model.items()}
    if set(model["pattern"]) & {*MIXER_LETTERS, "G"}:
        flat |= {f"mixer.{k}": v for k, v in values["mixer"].items() if k not in ("content_grad", "erase_bias")}
    if recipe.data.source == "recall":
        flat |= {f"data.recall.{k}": values["data"]["recall"][k] for k in ("num_keys", "num_values")}
    else:
        flat["data.tokenizer"] = recipe.data.tokenizer
    flat |= {f"megatron.{k}": v for k, v in values["megatron"].items() if not k.startswith(tuple(SAME_MODEL))}
    return flat


def _check_whole(folder: Path) -> None:
    """Raise CheckpointError unless every byte range that the checkpoint's index refers to is there."""
    from torch.distributed.checkpoint import FileSystemReader

    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the checkpoint is incomplete: {name} is missing; it was left as it is")
    try:
        index = FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged pickle may raise
        raise CheckpointError(f"{folder}: the checkpoint's index .metadata is damaged: {error}") from None
    needed: dict[str, int] = {}
    for part in (index.storage_data or {}).values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in needed.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual is None or actual < size:
            state = "missing" if actual is None else f"cut short ({actual} of {size} bytes)"
            raise CheckpointError(f"{folder}: the checkpoint is incomplete: {name} is {state}; it was left as it is")

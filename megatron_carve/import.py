"""Make a run of an exported Hugging Face folder: `python -m megatron_carve.import FOLDER RUN`.

The name is a keyword, so the module can be run and not imported; its work is in use/hugging_face.py and use/trained.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_carve.recipe import Recipe
from megatron_carve.run.folder import EARLIER_CARVE, RunFolder, is_earlier_carve, new_folder
from megatron_carve.run.program import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_carve.import",
        description="Makes a run of a folder that `python -m megatron_carve.export` wrote, whoever has trained its "
        "weights since, or of a KDA model of flash-linear-attention. Runs go on from it with checkpoint.load=RUN "
        "checkpoint.weights_only=true.",
    )
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors in it")
    parser.add_argument("run", type=Path, help="folder of the run to make")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _import(chosen.folder, chosen.run))


def _import(folder: Path, run: Path) -> None:
    from megatron_carve.use import fla, hugging_face

    origin = folder / hugging_face.CONFIG
    config = hugging_face.read_json(origin)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == fla.MODEL_TYPE:
        config = fla.configuration(config, folder)
    elif kind != "megatron_carve" or not isinstance(config.get("recipe"), dict):
        raise ValueError(f"{folder}: expected a folder that megatron_carve.export wrote, got model_type {kind!r}")
    if is_earlier_carve(config["recipe"]):
        raise ValueError(f"{folder}: the model is {EARLIER_CARVE}")
    _check_kept(config, str(origin))
    with new_folder(run) as partial:
        count = _write(folder, config, run, RunFolder(partial))
    print(f"{run}: {count:,} parameters")


def _check_kept(config: dict[str, Any], origin: str) -> None:
    """What a Recipe does not check, as whether its sections are there."""
    from megatron_carve.use import hugging_face

    for section in (*hugging_face.KEPT_SECTIONS, "data", "training"):
        if not isinstance(found := config["recipe"].get(section), dict):
            raise ValueError(f"{origin}: recipe.{section}: expected the section of a recipe, got {found!r}")
    tokenizer, step = config["recipe"]["data"].get("tokenizer", "bytes"), config.get("step", 1)
    if not isinstance(tokenizer, str):
        raise ValueError(f"{origin}: recipe.data.tokenizer: expected a string, got {tokenizer!r}")
    if type(step) is not int or step < 0:
        raise ValueError(f"{origin}: step: expected an integer of at least 0, got {step!r}")


def _write(folder: Path, config: dict[str, Any], run: Path, partial: RunFolder) -> int:
    """Fill the folder that becomes the run's; returns the model's number of parameters."""
    from megatron_carve.use import fla, hugging_face

    data = config["recipe"]["data"]
    if "tokenizer" in data:
        hugging_face.copy_tokenizer(folder, data["tokenizer"], partial.tokenizer)
    recipe = _recipe(config["recipe"], run, origin=str(folder / hugging_face.CONFIG))
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.use.trained import save_run

    weights = hugging_face.read_weights(folder)
    if config.get("model_type") == fla.MODEL_TYPE:
        weights = fla.weights(weights, config["recipe"])
    if recipe.model.tie_embeddings:
        weights.pop("lm_head.weight", None)
    ours = hugging_face.from_hugging_face(weights, recipe)
    save_run(recipe, ours, max(1, config.get("step", 1)), partial)
    return sum(w.numel() for w in ours.values())


def _recipe(values: dict, run: Path, *, origin: str) -> Recipe:
    """The kept sections of a recipe, as the recipe of a run in this folder that has nothing left to train."""
    values = {
        **values,
        "training": {**values["training"], "steps": 1},
        "run": {"name": run.name, "folder": str(run.parent)},
    }
    return Recipe.from_dict(values, origin=origin)


if __name__ == "__main__":
    sys.exit(main())

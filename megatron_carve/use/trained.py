"""A trained run as a model to use, in one process, whatever layout it was trained in."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_carve.data.tokenizer import Tokenizer, load_tokenizer
from megatron_carve.model.config import LayerImplementation
from megatron_carve.recipe import Recipe
from megatron_carve.recipe.schema import Checkpoint, Parallel
from megatron_carve.run.folder import MODEL_ARGUMENTS, CheckpointError, RunFolder
from megatron_carve.run.launch import join_processes, use_device, world_size
from megatron_carve.run.preflight import check_backend, choose_layers, megatron_arguments, try_in_megatron
from megatron_carve.run.session import choose_device, command_line, session
from megatron_carve.run.vocabulary import vocab_size


@dataclass(frozen=True)
class Trained:
    """A model to use, with the weights of a checkpoint or those that training begins with.

    Attributes:
        model: Megatron's HybridModel, in evaluation mode, in the run's precision.
        recipe: of the run, for one process.
        step: of the checkpoint; 0 without one.
        vocab_size: token ids that mean something; the model's logits may be more.
        tokenizer: None for a run on the generated recall task, whose tokens are no text.
    """

    model: torch.nn.Module
    recipe: Recipe
    step: int
    vocab_size: int
    device: torch.device
    tokenizer: Tokenizer | None


@contextlib.contextmanager
def trained_model(
    folder: str | Path, *, device: str = "auto", layers: LayerImplementation | Literal["auto"] = "auto",
    backend: str = "auto", step: int | None = None,
) -> Iterator[Trained]:  # fmt: skip
    """The model of a run's folder; Megatron's process state is set up for it, and undone at the end.

    Args:
        folder: of the run, that is with recipe.yaml and checkpoints/ in it.
        device: "cuda", "cpu" or "auto".
        layers: as model.layers of a recipe, whichever the run had.
        backend: as model.mixer_backend.
        step: of the checkpoint; the newest if None.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ValueError, ImportError, NotImplementedError: what does not fit this machine.
    """
    _require_one_process()
    run = RunFolder(Path(folder))
    if step is None:
        step = run.checkpoint_step()
        if step is None:
            raise CheckpointError(f"{run.path}: expected the folder of a run, but {run.checkpoints} has no checkpoint")
    elif step not in run.checkpoint_steps():
        there = ", ".join(map(str, run.checkpoint_steps())) or "none"
        raise CheckpointError(f"{run.checkpoints}: expected a step with a checkpoint ({there}), got {step}")
    else:
        run.check_whole(step)
    run.check_format(step, fsdp=False)
    found = use_device(device)
    recipe = _for_one_process(run.saved_recipe(), found, layers, backend)
    weights = [
        f"--load={run.checkpoints}", f"--ckpt-step={step}", "--finetune", "--no-load-optim", "--no-load-rng",
    ]  # fmt: skip
    with (
        run.data_check(step, weights_only=True) as data_is_whole,
        _in_evaluation(recipe, found, weights, run.tokenizer) as (trained, models),
    ):
        from megatron.training.checkpointing import load_checkpoint

        data_is_whole()
        run.check_contents(step)
        with contextlib.redirect_stdout(io.StringIO()):
            load_checkpoint(models, None, None)
        yield dataclasses.replace(trained, step=step)


@contextlib.contextmanager
def untrained_model(
    recipe: Recipe, *, device: str = "auto", layers: LayerImplementation | Literal["auto"] = "auto",
    backend: str = "auto",
) -> Iterator[Trained]:  # fmt: skip
    """A recipe's model with the weights that one process begins to train with. For the rest see trained_model."""
    _require_one_process()
    found = use_device(device)
    with _in_evaluation(_for_one_process(recipe, found, layers, backend), found, []) as (trained, _):
        yield trained


def _require_one_process() -> None:
    if world_size() != 1:
        raise ValueError(f"a trained model is used by one process, expected WORLD_SIZE 1, got {world_size()}")


@contextlib.contextmanager
def _in_evaluation(
    recipe: Recipe, device: Any, more_arguments: list[str], copy: Path | None = None
) -> Iterator[tuple[Trained, list[torch.nn.Module]]]:
    """The model of a recipe for one process, as it begins, and the list in which Megatron has it.

    `copy` is a run's, of its tokenizer.
    """
    check_backend(recipe, device)
    vocab = vocab_size(recipe, copy)
    tokenizer = None if recipe.data.source == "recall" else load_tokenizer(recipe.data.tokenizer, copy)
    with session():
        choose_device(device)
        chosen = choose_layers(recipe, device)
        models = _build([*_arguments(recipe, vocab, chosen, device), *more_arguments], recipe, chosen)
        from megatron.core.utils import unwrap_model

        yield Trained(unwrap_model(models)[0].eval(), recipe, 0, vocab, torch.device(device), tokenizer), models


def save_run(recipe: Recipe, weights: Mapping[str, torch.Tensor], step: int, run: RunFolder) -> None:
    """Make a run of a model's weights: its recipe and a checkpoint without an optimizer, from which others go on.

    Args:
        recipe: of the run.
        weights: by the names of a model with local layers.
        step: of the checkpoint, at least 1.
        run: where they are written.

    Raises:
        ValueError: weights of other shapes.
    """
    built = _for_one_process(recipe, "cpu", "local", "torch")
    with session():
        choose_device("cpu")
        argv = _arguments(built, vocab_size(built, run.tokenizer), "local", "cpu")
        models = _build([*argv, f"--save={run.checkpoints}", "--no-save-optim", "--no-save-rng"], built, "local")
        from megatron.core.utils import unwrap_model
        from megatron.training.checkpointing import save_checkpoint

        own = {name: x for name, x in unwrap_model(models)[0].state_dict().items() if x is not None}
        for name, x in own.items():
            if name not in weights or weights[name].shape != x.shape:
                found = tuple(weights[name].shape) if name in weights else "nothing"
                raise ValueError(f"weights: expected {name} of shape {tuple(x.shape)}, got {found}")
            x.copy_(weights[name])
        run.save_recipe(recipe)
        with contextlib.redirect_stdout(io.StringIO()):
            save_checkpoint(step, models, None, None, 0)


def _for_one_process(recipe: Recipe, device: Any, layers: Any, backend: Any) -> Recipe:
    """Without what only training needs, or several processes."""
    megatron = {key: value for key, value in recipe.megatron.items() if key.startswith(MODEL_ARGUMENTS)}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, layers=layers, mixer_backend=backend),
        parallel=Parallel(),
        checkpoint=Checkpoint(),
        training=dataclasses.replace(recipe.training, global_batch_size=recipe.training.micro_batch_size),
        run=dataclasses.replace(recipe.run, device=device, wandb=None),
        megatron=megatron,
    )


def _arguments(recipe: Recipe, vocab: int, layers: LayerImplementation, device: str) -> list[str]:
    """Megatron's command line, without what writes into the run's folder."""
    argv = megatron_arguments(recipe, vocab_size=vocab, layers=layers, device=device)
    return [word for word in argv if not word.startswith(("--save=", "--tensorboard-dir="))]


def _build(argv: list[str], recipe: Recipe, layers: LayerImplementation) -> list[torch.nn.Module]:
    """Set up Megatron for one process, and build its wrapped model with fresh weights; for a session to undo.

    Raises:
        ValueError: what Megatron objects to in its arguments.
    """
    try_in_megatron(argv, recipe, layers)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.hybrid import HybridModelBuilder

    from megatron_carve.run.task import model_config

    store, _, _ = join_processes()
    # Megatron reports its arguments and progress on standard output, where an answer is to come.
    with contextlib.redirect_stdout(io.StringIO()):
        with command_line(argv):
            args = parse_and_validate_args()
        initialize_megatron(
            allow_no_cuda=recipe.run.device == "cpu", store=torch.distributed.PrefixStore("megatron", store)
        )
        builder = HybridModelBuilder(model_config(args, recipe, layers))
        return builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )

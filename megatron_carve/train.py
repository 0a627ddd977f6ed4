"""Train a model: `torchrun ... -m megatron_carve.train RECIPE [section.key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_carve.recipe import load_recipe, recipe_names
from megatron_carve.recipe.reference import listing
from megatron_carve.run.program import exit_status

if TYPE_CHECKING:
    from megatron_carve.evaluate import Chosen
    from megatron_carve.run.preflight import Plan
    from megatron_carve.run.speed import Gpus

PRINT = "--print"
USAGE = """\
usage: python -m megatron_carve.train RECIPE [section.key=value ...] [--print]
       torchrun --nproc-per-node N -m megatron_carve.train RECIPE [section.key=value ...]

RECIPE is a YAML file or one of: {names}.
--print prints the recipe with all that it inherits, its defaults and the overrides, as YAML, and trains nothing.

Every key:

{keys}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in ([], [PRINT]) or {"-h", "--help"} & set(words):
        print(USAGE.format(names=", ".join(recipe_names()), keys=listing()))
        return 0 if {"-h", "--help"} & set(words) else 2
    if PRINT in words:
        words.remove(PRINT)
        return exit_status(lambda: load_recipe(words[0], words[1:]), lambda recipe: print(recipe.dump(), end=""))
    return exit_status(lambda: _prepared(words), _train, log=sys.stdout)


def _prepared(words: Sequence[str]) -> tuple[Plan, Chosen | None]:
    recipe = load_recipe(words[0], words[1:])
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.run.preflight import prepare
    from megatron_carve.use import samples

    tasks = samples.check(recipe) if samples.wanted(recipe) else None
    return prepare(recipe), tasks


def _train(prepared: tuple[Plan, Chosen | None]) -> None:
    plan, tasks = prepared
    from megatron_carve.run.pretraining import pretrain
    from megatron_carve.run.progress import Progress
    from megatron_carve.use import samples

    recipe, start = plan.recipe, plan.start
    total = recipe.training.total_steps
    progress = Progress(recipe, chance_loss=start.chance_loss, first_step=start.step + 1, gpus=_gpus(plan))
    if start.step >= total:
        if plan.rank == 0:
            progress.say(f"{recipe.run.name}: the checkpoint is at step {start.step} of {total}: nothing left to train")
            if start.resumes and not plan.folder.summary.exists():  # it was killed between its last save and these
                progress.finish(parameters=None, device=plan.device, layers=plan.layers)
        return
    if plan.rank == 0:
        verb = "resuming" if start.resumes else "continuing another run"
        begin = f"{verb} at step {start.step}" if start.step else "starting"
        progress.begin(f"{recipe.run.name}: {recipe.model.pattern} on {plan.device}, {begin}, {total} steps")
    if samples.wanted(recipe):
        listener = samples.Samples(progress, plan, tasks)
        parameters = pretrain(plan, listener, listener.take)
    else:
        parameters = pretrain(plan, progress)
    if progress.writes:
        progress.finish(parameters=parameters, device=plan.device, layers=plan.layers)


def _gpus(plan: Plan) -> Gpus | None:
    import torch

    from megatron_carve.recipe.estimate import training_flops_per_token
    from megatron_carve.run.launch import world_size
    from megatron_carve.run.speed import Gpus, peak_tflops

    if plan.device != "cuda":
        return None
    operations = training_flops_per_token(plan.recipe, plan.start.vocab_size)
    peak = peak_tflops(torch.cuda.get_device_name(), plan.recipe.training.precision)
    return Gpus(world_size(), operations, peak)


if __name__ == "__main__":
    sys.exit(main())

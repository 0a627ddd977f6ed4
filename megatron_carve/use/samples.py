"""What a model says, and how it does in tasks, while it is trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_carve import evaluate
from megatron_carve.model.variants import MIXER_LETTERS
from megatron_carve.recipe import Recipe
from megatron_carve.run.data import run_tokenizer

if TYPE_CHECKING:
    import torch

    from megatron_carve.data.tokenizer import Tokenizer
    from megatron_carve.run.preflight import Plan
    from megatron_carve.run.progress import Progress
    from megatron_carve.use.trained import Trained


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe asks for any of it."""
    return bool(recipe.run.sample_prompts or recipe.run.evaluate)


def check(recipe: Recipe) -> evaluate.Chosen | None:
    """The tasks of a recipe that wants samples or tasks; None without tasks.

    Raises:
        ValueError, OSError, ImportError, NotImplementedError: in one line what is wrong.
    """
    key = "run.sample_prompts" if recipe.run.sample_prompts else "run.evaluate"
    if recipe.data.source == "recall":
        raise ValueError(f"{key}: expected data of text, got generated tokens")
    for name in ("tensor", "pipeline", "context"):
        if (size := getattr(recipe.parallel, name)) > 1:
            raise ValueError(f"{key}: expected parallel.{name}=1, which leaves a process the whole model, got {size}")
    letters = (*MIXER_LETTERS, "*", "-")  # generation's, which imports Megatron
    if others := sorted(set(recipe.model.pattern) - {*letters, "|"}):
        raise NotImplementedError(f"{key}: expected layers of {', '.join(letters)}, got {', '.join(others)}")
    return None if recipe.run.evaluate is None else _tasks(recipe)


def _tasks(recipe: Recipe) -> evaluate.Chosen:
    parser = evaluate.options()
    parser.error = _refuse  # type: ignore[method-assign]
    assert recipe.run.evaluate is not None
    chosen = parser.parse_args([str(recipe.run.path), *shlex.split(recipe.run.evaluate)])
    for name in ("out", "step", "device"):
        if getattr(chosen, name) != parser.get_default(name):
            raise ValueError(f"run.evaluate: --{name} is decided by the run")
    return evaluate.checked(chosen)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"run.evaluate: {message}")


class Samples:
    """A listener that makes samples and does tasks at every evaluation, and passes on what it is told.

    One process does, with its own copy of the model; the others of data parallelism wait.
    """

    def __init__(self, progress: Progress, plan: Plan, tasks: evaluate.Chosen | None) -> None:
        self.progress, self.plan, self.tasks = progress, plan, tasks
        self.on_step, self.on_save = progress.on_step, progress.on_save
        self._models: Sequence[torch.nn.Module] = ()
        self._done: int | None = None  # the step of the last ones; of the last step there are two evaluations

    def take(self, models: Sequence[torch.nn.Module]) -> None:
        """The model that is trained, in whatever it is wrapped in."""
        self._models = models

    def on_evaluation(self, losses: dict[str, Any]) -> None:
        self.progress.on_evaluation(losses)
        step = self.progress.step
        if self.plan.rank == 0 and step != self._done:
            self._done = step
            self._all(step)
            self.progress.pause()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return run_tokenizer(self.plan.recipe)

    def _all(self, step: int) -> None:
        import torch
        from megatron.core.utils import unwrap_model

        from megatron_carve.use.trained import Trained

        model = unwrap_model(list(self._models))[0]
        training = model.training
        recipe, start = self.plan.recipe, self.plan.start
        device = torch.device(self.plan.device)
        trained = Trained(model.eval(), recipe, step, start.vocab_size, device, self._tokenizer)
        try:
            with torch.no_grad():
                self._samples(trained)
                self._tasks(trained)
        finally:
            model.train(training)

    def _samples(self, trained: Trained) -> None:
        import torch

        from megatron_carve.use.continuation import Continuation
        from megatron_carve.use.generation import Sampling, generate

        tokenizer = trained.tokenizer
        assert tokenizer is not None
        for prompt in self.plan.recipe.run.sample_prompts:
            ids = torch.tensor(tokenizer.encode(prompt).tolist() or [tokenizer.eod])
            text = Continuation(tokenizer)
            for token in generate(
                trained.model, [ids], max_new_tokens=self.plan.recipe.run.sample_tokens, sampling=Sampling(),
                vocab_size=trained.vocab_size, cuda_graph=False,
            ):  # fmt: skip
                text.add(int(token))
                if text.ended:
                    break
            shown = json.dumps(prompt + text.finish(), ensure_ascii=False)
            self.progress.say(f"  sample at step {trained.step}: {shown}")
            _append(self.plan.folder.samples, {"step": trained.step, "prompt": prompt, "text": text.text})

    def _tasks(self, trained: Trained) -> None:
        if self.tasks is None:
            return
        try:
            todo = evaluate.parts(trained, self.tasks)
        except ValueError as error:
            self.progress.say(f"  run.evaluate: {error}")
            return
        for part in todo:
            try:
                found = part()
            except Exception as error:  # whatever a task raises whose data cannot be had; training goes on
                self.progress.say(f"  run.evaluate: {type(error).__name__}: {' '.join(str(error).split())}")
                continue
            for line in evaluate.report(found):
                self.progress.say(f"  {line}")
            _append(self.plan.folder.evaluations, {"step": trained.step, **found})


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

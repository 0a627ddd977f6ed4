"""A checked plan in Megatron's training loop."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TextIO

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args
from megatron.training import pretrain as megatron_pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_carve.patches import TrainingListener, applied_patches
from megatron_carve.run.compiling import compile_kernels
from megatron_carve.run.full_disk import full_disk
from megatron_carve.run.preflight import Plan
from megatron_carve.run.program import LogHandler
from megatron_carve.run.retention import Retention
from megatron_carve.run.session import command_line, patch_megatron
from megatron_carve.run.stopping import Stopped, interruptible
from megatron_carve.run.task import Task, count_parameters, model_config

# What it reports as errors it raises too.
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def pretrain(
    plan: Plan, listener: TrainingListener, on_models: Callable[[Sequence[torch.nn.Module]], None] = lambda _: None
) -> int:
    """Hand everything to Megatron. Returns the model's number of parameters.

    Args:
        listener: is told about every step.
        on_models: is given the wrapped parts of the model that this rank holds, before training.

    Raises:
        Stopped: it was asked to stop, by SIGTERM or Ctrl-C, and has finished its step and saved.
    """
    errors = get_error_handler()
    errors.initialize()
    console = sys.stderr
    says = partial(_say, plan, console)
    with _megatron_output(plan), _forked_workers(), _user_buffers(plan), interruptible(says) as interrupted:
        try:
            return _pretrain(plan, listener, on_models)
        except SystemExit as end:
            if end.code or _ends_itself():
                raise
            by = signal.SIGINT if interrupted() else signal.SIGTERM
        except Exception as error:
            errors.record_exception(error)  # torchrun closes with the first failure of all ranks
            raise
    raise Stopped(_where_it_stands(plan, by), by)


def _say(plan: Plan, console: TextIO, line: str) -> None:
    if plan.rank == 0:
        print(line, file=console, flush=True)


def _ends_itself() -> bool:
    """Whether Megatron has reasons of its own to end before the last step."""
    args = get_args()
    return bool(args.exit_interval or args.exit_duration_in_mins or args.phase_transition_iterations)


def _where_it_stands(plan: Plan, by: signal.Signals) -> str:
    what = f"{plan.recipe.run.name}: stopped by {'Ctrl-C' if by == signal.SIGINT else by.name}"
    step = plan.folder.checkpoint_step() if plan.recipe.checkpoint.interval else None
    if step is None:
        return f"{what}; nothing is saved, since checkpoint.interval is null"
    return f"{what}; step {step} is saved in {plan.folder.checkpoints}, and the same command goes on from there"


def _pretrain(plan: Plan, listener: TrainingListener, on_models: Callable[[Sequence[torch.nn.Module]], None]) -> int:
    rule = plan.recipe.checkpoint
    patch_megatron(FiniteGradients(Retention(listener, rule, plan.folder, removes=plan.rank == 0)))
    print(f"patches to Megatron-Core: {', '.join(applied_patches())}")
    with command_line(plan.argv):
        args = parse_and_validate_args()
    config = model_config(args, plan.recipe, plan.layers)
    models: list[torch.nn.Module] = []

    def remember(built: list[torch.nn.Module]) -> list[torch.nn.Module]:
        models.extend(built)
        on_models(built)
        return built

    def compiled(built: list[torch.nn.Module]) -> list[torch.nn.Module]:
        compile_kernels(built, plan.recipe)
        return built

    config.pre_wrap_hooks = [compiled]  # data parallelism's wrapper watches what is called
    config.post_wrap_hooks = [remember]
    task = Task(plan.recipe, plan.start.vocab_size, plan.start.eod, plan.blend)

    def datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple:
        return task.datasets(num_samples, vp_stage)

    setattr(datasets, "is_distributed", True)  # noqa: B010  Megatron's mark: every rank builds its own part
    try:
        megatron_pretrain(
            pretrain_cfg_container_from_args(args, config),
            datasets,
            ModelType.encoder_or_decoder,
            task.forward_step,
            store=torch.distributed.PrefixStore("megatron", plan.store),
        )
        return count_parameters(models)
    finally:
        # A method of the optimizer, which keeps fp32 parameters through torch's graph, where garbage collection sees no
        # cycle: model and optimizer would stay in memory.
        config.grad_scale_func = None
        _kill_data_workers()


@contextlib.contextmanager
def _user_buffers(plan: Plan) -> Iterator[None]:
    """Those that Megatron, before it builds the model, has Transformer Engine make for tp_comm_overlap are freed.

    That waits for the GPU, and so perhaps for another rank, as one that failed must not; and ends a process whose CUDA
    is broken. There they are left to the end of the process.
    """
    try:
        yield
    finally:
        if plan.recipe.megatron.get("tp_comm_overlap"):
            from transformer_engine.pytorch import destroy_ub

            if not isinstance(sys.exception(), Exception | KeyboardInterrupt) or _gpu_is_idle():
                destroy_ub()


def _gpu_is_idle() -> bool:
    try:
        return torch.cuda.current_stream().query()
    except RuntimeError:
        return False


@contextlib.contextmanager
def _forked_workers() -> Iterator[None]:
    """Data workers get their datasets by being forked: parts of Megatron's cannot be pickled, as other ways to start a
    process need, among them the one that Python takes from 3.14 on."""
    kept = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(kept, force=True)


def _kill_data_workers() -> None:
    """Megatron's data workers ignore SIGTERM, by which the interpreter would end them: its exit waited for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the death of a worker as a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # as workers are, and the server is not through which Megatron's later saves go
            child.kill()


class FiniteGradients:
    """A listener that ends training at a step whose gradients are no numbers, and else passes on what it is told.

    That step has changed the weights already; it is not saved.
    """

    def __init__(self, listener: TrainingListener) -> None:
        self.listener = listener
        self.on_evaluation, self.on_save = listener.on_evaluation, listener.on_save

    def on_step(self, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        if grad_norm is not None and not math.isfinite(grad_norm):  # None where a loss scaler has skipped the step
            raise FloatingPointError(
                f"step {iteration}: expected a finite norm of the gradients, got {grad_norm}; checkpoints of earlier "
                "steps are whole"
            )
        self.listener.on_step(iteration, losses, learning_rate, grad_norm)


@contextlib.contextmanager
def _megatron_output(plan: Plan) -> Iterator[None]:
    """Megatron and torch print hundreds of lines; unless asked otherwise they go to a file per rank."""
    if plan.recipe.run.megatron_output == "console":
        yield
        return
    plan.folder.logs.mkdir(parents=True, exist_ok=True)
    log = plan.folder.logs / f"rank{plan.rank}.log"
    console, root = sys.stderr, logging.getLogger()
    kept = root.handlers[:]
    file = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    with file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        errors = logging.StreamHandler(console)
        errors.setLevel(logging.ERROR)
        errors.addFilter(lambda record: record.name != WRITER)
        handlers: list[logging.Handler] = [LogHandler(file), errors]
        logging.basicConfig(handlers=handlers, format="%(levelname)s %(name)s %(message)s", force=True)
        logging.captureWarnings(True)
        try:
            yield
        except BaseException as error:
            quiet = isinstance(error, KeyboardInterrupt) or full_disk(error)
            if not quiet and (not isinstance(error, SystemExit) or error.code):
                print(f"rank {plan.rank} failed; what Megatron printed before is in {log}", file=console)
                # torch complains of the groups that a failed rank leaves as they are, when the interpreter ends.
                atexit.register(os.dup2, os.dup(file.fileno()), 2)
            raise
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = kept

"""What the programs share: mistakes end in one line, words become a checked plan, a plan Megatron's training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from megatron_carve.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from megatron_carve.patches.training_events import TrainingListener
    from megatron_carve.preflight import Plan


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a program: 0, or 2 where it ends in a user's mistake, said in one line on stderr.

    Interrupted from the keyboard it is 130, and 141 where nobody reads the output any more, as a shell would say.
    """
    try:
        _configure_log(sys.stderr)  # standard output is for the answer
        logging.getLogger("megatron").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns of every optional package, which our log says once
            work()
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails too
        return 141
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        from megatron_carve.patches import PatchError

        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError | PatchError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan_or_complain(load: Callable[[], Recipe]) -> Plan | None:
    """The plan of the recipe that `load` returns; None where it is a user's mistake, said in one line on stderr."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists, before Blackwell
    try:
        recipe = load()
        _configure_log(sys.stdout)
        with warnings.catch_warnings():
            # Here because torch takes seconds to import; a typing mistake need not wait.
            from megatron_carve.patches import PatchError
            from megatron_carve.preflight import prepare

            warnings.simplefilter("ignore")  # Megatron warns of every optional package, which our log says once
            try:
                return prepare(recipe)
            except PatchError as error:
                raise ValueError(error) from error
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process of a node finds the same mistake
            print(f"error: {error}", file=sys.stderr)
        return None


def pretrain(
    plan: Plan, listener: TrainingListener, on_models: Callable[[Sequence[torch.nn.Module]], None] = lambda _: None
) -> int:
    """Hand everything to Megatron. Returns the model's number of parameters.

    Args:
        listener: is told about every step.
        on_models: is given the wrapped parts of the model that this rank holds, before training.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    errors = get_error_handler()
    errors.initialize()
    with _megatron_output(plan):
        try:
            return _pretrain(plan, listener, on_models)
        except Exception as error:
            errors.record_exception(error)  # torchrun closes with the first failure of all ranks
            raise


def _pretrain(plan: Plan, listener: TrainingListener, on_models: Callable[[Sequence[torch.nn.Module]], None]) -> int:
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as megatron_pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_carve.pretraining import Task, count_parameters, model_config

    _apply_patches(listener)
    sys.argv = [sys.argv[0], *plan.argv]
    args = parse_and_validate_args()
    config = model_config(args, plan.recipe, plan.layers)
    models: list[torch.nn.Module] = []

    def remember(built: list[torch.nn.Module]) -> list[torch.nn.Module]:
        models.extend(built)
        on_models(built)
        return built

    config.post_wrap_hooks = [remember]
    task = Task(plan.recipe, plan.start.vocab_size, plan.start.eod, plan.text)

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
        _kill_data_workers()
        # A rank that failed does not wait for the others, which wait for it.
        if torch.distributed.is_initialized() and not isinstance(sys.exception(), Exception):
            torch.distributed.destroy_process_group()


def _kill_data_workers() -> None:
    """Megatron's data workers ignore SIGTERM, by which the interpreter would end them: its exit waited for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the death of a worker as a failure
    for worker in multiprocessing.active_children():
        worker.kill()


class FiniteGradients:
    """A listener that ends training at a step whose gradients are no numbers, and else passes on what it is told.

    That step has changed the weights already; it is not saved.
    """

    def __init__(self, listener: TrainingListener) -> None:
        self.listener = listener
        self.on_evaluation = listener.on_evaluation

    def on_step(self, iteration: int, losses: dict[str, Any], learning_rate: float | None, grad_norm: Any) -> None:
        if grad_norm is not None and not math.isfinite(grad_norm):  # None where a loss scaler has skipped the step
            raise FloatingPointError(
                f"step {iteration}: expected a finite norm of the gradients, got {grad_norm}; checkpoints of earlier "
                "steps are whole"
            )
        self.listener.on_step(iteration, losses, learning_rate, grad_norm)


def _apply_patches(listener: TrainingListener) -> None:
    from megatron_carve import patches
    from megatron_carve.notices import say_once
    from megatron_carve.pretraining import mixer_flops
    from megatron_carve.stack import MixerStack
    from megatron_carve.variants import MIXER_LETTERS

    for patch in (
        patches.dataset_helpers,
        patches.layer_symbols,
        patches.adam_resume,
        patches.mixed_precision_groups,
        patches.mtp_stack(MixerStack),
        patches.flops(mixer_flops, MIXER_LETTERS),
        patches.training_events(FiniteGradients(listener)),
    ):
        patch.apply()
    say_once(f"patches to Megatron-Core: {', '.join(patches.applied_patches())}")


@contextlib.contextmanager
def _megatron_output(plan: Plan) -> Iterator[None]:
    """Megatron prints hundreds of lines; unless asked otherwise they go to a file per rank."""
    if plan.recipe.run.megatron_output == "console":
        yield
        return
    plan.folder.logs.mkdir(parents=True, exist_ok=True)
    log = plan.folder.logs / f"rank{plan.rank}.log"
    root = logging.getLogger()
    kept = root.handlers[:]
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file):
        errors = logging.StreamHandler(sys.stderr)
        errors.setLevel(logging.ERROR)
        handlers: list[logging.Handler] = [logging.StreamHandler(file), errors]
        logging.basicConfig(handlers=handlers, format="%(levelname)s %(name)s %(message)s", force=True)
        logging.captureWarnings(True)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                print(f"rank {plan.rank} failed; what Megatron printed before is in {log}", file=sys.stderr)
            raise
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = kept


def _configure_log(stream: TextIO) -> None:
    """Our notices go to rank 0's console, one line each."""
    logger = logging.getLogger("megatron_carve")
    logger.handlers.clear()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False
    # It warns where a CUDA compiler is installed and no GPU is, which concerns nothing here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

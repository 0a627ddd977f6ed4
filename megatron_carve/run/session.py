"""Megatron in this process: our patches to it, its command line and its process groups; all undone at the end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_carve.patches import TrainingListener

# What a program sets for Megatron, torch.distributed and torch.load, and Megatron for Transformer Engine.
ENVIRONMENT = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
    "UB_SKIPMC", "UB_TIMEOUT",
)  # fmt: skip


# By which torch's users ask for checkpoints to be unpickled, whatever is in them.
TRUSTING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def trusts_pickles() -> bool:
    """Whether the environment asks for it, by torch's own reading."""
    return os.environ.get(TRUSTING, "0").lower() in ("1", "y", "yes", "true")


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A stretch of a program at whose end there is nothing left of Megatron's state, so that another can follow.

    What was there before it stays: patches in force, and a process group with what Megatron knows. After a session on
    the CPU, Megatron goes without GPU libraries for the rest of the process.
    """
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    if not trusts_pickles():
        # Of what strangers may have pickled into a checkpoint torch then makes only the types that Megatron names.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    before, joined = _patches_in_force(), _in_a_group()
    try:
        yield
    finally:
        # A rank that failed does not wait for the others, which wait for it.
        fails = isinstance(sys.exception(), Exception | KeyboardInterrupt) and os.environ.get("WORLD_SIZE", "1") != "1"
        if not joined and not fails:
            _forget_megatron()
        for name in reversed(_patches_in_force()):
            if name not in before:
                sys.modules["megatron_carve.patches.patch"].revert(name)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def choose_device(device: str) -> None:
    """Before Megatron is imported, so that on the CPU it does not pick GPU libraries."""
    if device == "cpu":
        from megatron_carve.patches import cpu_mode

        cpu_mode.apply()


def patch_megatron(listener: TrainingListener | None = None) -> None:
    """Everything that models with our layers need of Megatron, and a listener for its training loop.

    Raises:
        PatchError: the installed Megatron is not one that a patch is for.
    """
    from megatron_carve import patches
    from megatron_carve.model.stack import MixerStack
    from megatron_carve.model.variants import MIXER_LETTERS
    from megatron_carve.run.task import layer_flops

    for patch in (
        patches.dataset_helpers,
        patches.layer_symbols,
        patches.adam_resume,
        patches.checkpoint_index,
        patches.checkpoint_checksums,
        patches.saving_processes,
        patches.mixed_precision_groups,
        patches.muon_parameters,
        patches.expert_optimizers,
        patches.offloaded_optimizer,
        patches.layer_wise_optimizer,
        patches.forward_hooks,
        patches.process_group_device,
        patches.mtp_stack(MixerStack),
        patches.flops(layer_flops, [*MIXER_LETTERS, "*"]),
        *([] if listener is None else [patches.training_events(listener)]),
    ):
        patch.apply()


@contextlib.contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """Megatron reads its arguments from the command line of the process."""
    kept, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        yield
    finally:
        sys.argv = kept


def _patches_in_force() -> list[str]:
    """None where nothing has imported them, which takes seconds."""
    patches = sys.modules.get("megatron_carve.patches")
    return [] if patches is None else patches.applied_patches()


def _in_a_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _forget_megatron() -> None:
    """Its groups and globals, and what was said once; nothing where it has not been imported."""
    if (notices := sys.modules.get("megatron_carve.notices")) is not None:
        notices.say_once.cache_clear()
    if _in_a_group():
        sys.modules["torch.distributed"].destroy_process_group()
    if "megatron.training.global_vars" in sys.modules:
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
        from megatron.core.parallel_state import destroy_model_parallel
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine
        from megatron.training.global_vars import destroy_global_vars

        destroy_model_parallel()
        destroy_num_microbatches_calculator()
        destroy_rerun_state_machine()
        destroy_global_vars()

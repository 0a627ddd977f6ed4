"""Runtime patches to Megatron-Core: one per file, applied by whoever needs them and never at import."""

from megatron_carve.patches.adam_resume import adam_resume
from megatron_carve.patches.checkpoint_checksums import checkpoint_checksums
from megatron_carve.patches.checkpoint_index import ForeignObject, checkpoint_index, read_index
from megatron_carve.patches.cpu_mode import cpu_mode, cpu_mode_in_this_thread
from megatron_carve.patches.dataset_helpers import dataset_helpers
from megatron_carve.patches.expert_optimizers import expert_optimizers
from megatron_carve.patches.flops import flops
from megatron_carve.patches.forward_hooks import forward_hooks
from megatron_carve.patches.layer_symbols import layer_symbols
from megatron_carve.patches.layer_wise_optimizer import layer_wise_optimizer
from megatron_carve.patches.mixed_precision_groups import mixed_precision_groups
from megatron_carve.patches.mtp_stack import mtp_stack
from megatron_carve.patches.muon_parameters import muon_parameters
from megatron_carve.patches.offloaded_optimizer import offloaded_optimizer
from megatron_carve.patches.patch import Patch, PatchError, Replacement, applied_patches
from megatron_carve.patches.process_group_device import process_group_device
from megatron_carve.patches.saving_processes import saving_processes
from megatron_carve.patches.training_events import TrainingListener, training_events

__all__ = [
    "ForeignObject",
    "Patch",
    "PatchError",
    "Replacement",
    "TrainingListener",
    "adam_resume",
    "applied_patches",
    "checkpoint_checksums",
    "checkpoint_index",
    "cpu_mode",
    "cpu_mode_in_this_thread",
    "dataset_helpers",
    "expert_optimizers",
    "flops",
    "forward_hooks",
    "layer_symbols",
    "layer_wise_optimizer",
    "mixed_precision_groups",
    "mtp_stack",
    "muon_parameters",
    "offloaded_optimizer",
    "process_group_device",
    "read_index",
    "saving_processes",
    "training_events",
]

"""The patches of the package for tests, and what all tests of patches ask."""

from types import SimpleNamespace

import pytest

from megatron_carve import patches
from megatron_carve.patches import PatchError, applied_patches


def real_patches():
    """Every patch of the package, new where it takes an argument."""
    return {
        "dataset_helpers": patches.dataset_helpers,
        "layer_symbols": patches.layer_symbols,
        "adam_resume": patches.adam_resume,
        "checkpoint_index": patches.checkpoint_index,
        "checkpoint_checksums": patches.checkpoint_checksums,
        "saving_processes": patches.saving_processes,
        "mixed_precision_groups": patches.mixed_precision_groups,
        "muon_parameters": patches.muon_parameters,
        "expert_optimizers": patches.expert_optimizers,
        "offloaded_optimizer": patches.offloaded_optimizer,
        "layer_wise_optimizer": patches.layer_wise_optimizer,
        "forward_hooks": patches.forward_hooks,
        "process_group_device": patches.process_group_device,
        "cpu_mode": patches.cpu_mode,
        "flops": patches.flops(lambda args, letter: 0.0, "C2"),
        "mtp_stack": patches.mtp_stack(object),
        "training_events": patches.training_events(SimpleNamespace()),
    }


def refusal(patch):
    in_force = applied_patches()
    with pytest.raises(PatchError) as error:
        patch.apply()
    assert not patch.applied
    assert applied_patches() == in_force
    return str(error.value)

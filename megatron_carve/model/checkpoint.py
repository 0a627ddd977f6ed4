"""Sharded checkpoint description of a mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn


def sharded_mixer_state(
    module: nn.Module,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict[str, Any] | None,
    *,
    tp_group: Any,
    split: Mapping[str, Mapping[str, int]],
) -> ShardedStateDict:
    """Describe every parameter of `module` to Megatron's distributed checkpoints.

    Args:
        prefix, sharded_offsets, metadata: as Megatron passes them.
        tp_group: the tensor-parallel group that parameters with `tensor_model_parallel` are sharded over.
        split: for each fused tensor, its sections by name and size on this rank. Storing sections apart is what
            makes a checkpoint independent of the tensor-parallel size.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    projections = {name: child for name, child in module.named_children() if hasattr(child, "sharded_state_dict")}
    own = {n: p for n, p in module.named_parameters() if n.split(".")[0] not in projections}
    state: dict = make_sharded_tensors_for_checkpoint(
        own,
        prefix,
        {n: getattr(p, "partition_dim") for n, p in own.items() if getattr(p, "tensor_model_parallel", False)},  # noqa: B009
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    for name, child in projections.items():
        state.update(
            sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
        )
    for name, sections in split.items():
        key = prefix + name
        if key in state:
            state[key] = _split_tensor_factory(state[key], list(sections.values()), list(sections), 0)
    return state

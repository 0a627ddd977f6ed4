"""Let the distributed optimizer save and load models with float32 parameters among 16-bit ones."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement


def _in_the_optimizers_order(original: classmethod) -> classmethod:
    """Index parameters in the order in which the optimizer really keeps them: float32 ones first in each group."""

    @functools.wraps(original.__func__)
    def build(cls: type, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        positions, group_ranges = original.__func__(cls, param_groups, gbuf_ranges)
        for group_index, group_range in enumerate(group_ranges):
            params: list[Any] = sorted(group_range["params"], key=lambda p: p.dtype != torch.float32)
            group_range["params"] = params
            positions.update({p: (group_index, order) for order, p in enumerate(params)})
        return positions, group_ranges

    return classmethod(build)


mixed_precision_groups = Patch(
    name="mixed_precision_groups",
    reason="the distributed optimizer indexes a group's parameters in bucket order but keeps float32 ones first, so "
    "with A_log and dt_bias in a bf16 model it saves and loads the wrong states",
    upstream="megatron/core/optimizer/distrib_optimizer.py, _build_optimizer_group_ranges against "
    "_build_model_and_main_param_groups",
    remove_when="both orders agree upstream",
    replacements=[
        Replacement(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_optimizer_group_ranges",
            _in_the_optimizers_order,
        )
    ],
)

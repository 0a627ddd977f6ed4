"""Let the distributed optimizer save and load models with float32 parameters among 16-bit ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def _as_trained(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The precision-aware optimizer trains a float32 parameter itself, but saves the copy with which it began."""

    @functools.wraps(original)
    def states(self: Any, model_param: torch.Tensor) -> dict[str, Any]:
        tensors = original(self, model_param)
        kept_by_adam = (
            self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not self.config.optimizer_cpu_offload
        )
        if kept_by_adam and model_param.dtype == torch.float32:
            group, order = self.model_param_group_index_map[model_param]
            tensors["param"] = self.optimizer.param_groups[group]["params"][order].detach()
        return tensors

    return states


mixed_precision_groups = Patch(
    name="mixed_precision_groups",
    reason="the distributed optimizer indexes a group's parameters in bucket order but keeps float32 ones first, so "
    "with A_log and dt_bias in a bf16 model it saves and loads the wrong states; the precision-aware one saves them "
    "untrained",
    upstream="megatron/core/optimizer/distrib_optimizer.py, _build_optimizer_group_ranges against "
    "_build_model_and_main_param_groups, and _get_main_param_and_optimizer_states",
    remove_when="both orders agree upstream, and what is saved of a float32 parameter is what was trained",
    replacements=[
        Replacement(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_optimizer_group_ranges",
            _in_the_optimizers_order,
        ),
        Replacement(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_main_param_and_optimizer_states",
            _as_trained,
        ),
    ],
)

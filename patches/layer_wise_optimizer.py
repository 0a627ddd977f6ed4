"""Muon's state spread over data-parallel ranks in the models that Megatron's pretrain() builds of a configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_carve.patches.patch import Patch, Replacement


def _with_buffers_of_matrices(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrap(model: list[Any], data_parallel_random_init: bool, ddp_config: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing
        from megatron.training import global_vars

        chosen = global_vars._GLOBAL_ARGS  # None where Megatron-Bridge trains
        if chosen is not None and chosen.use_layer_wise_distributed_optimizer:
            tag_params_for_buffer_routing(model)
            ddp_config.use_distributed_optimizer = True
        return original(model, data_parallel_random_init, ddp_config, *args, **kwargs)

    return wrap


def _layer_wise(_: type) -> type:
    """It is asked for the layout of buffers alone; that of buffers without matrices is the original's."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    return LayerWiseDistributedOptimizer


def _of_whole_optimizers(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any, optimizers: list[Any], config: Any, pg_collection: Any = None, init_state_fn_list: Any = None,
        model_chunks: Any = None,
    ) -> None:  # fmt: skip
        if not config.bf16:
            optimizers = [_of_float32(o, config, f) for o, f in zip(optimizers, init_state_fn_list, strict=True)]
        original(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)

    return init


def _of_float32(optimizer: Any, config: Any, init_state: Callable[..., None]) -> Any:
    """Megatron's optimizer of a float32 model, with its state where the layer-wise optimizer looks for it."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    class Nested(FP32Optimizer):
        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"optimizer": super().sharded_state_dict(*args, **kwargs)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict["optimizer"])

    return Nested(optimizer, config, init_state)


layer_wise_optimizer = Patch(
    name="layer_wise_optimizer",
    reason="the layer-wise optimizer needs buffers of whole matrices, which only one of the two ways to build a model "
    "makes, and in float32 takes bare optimizers for Megatron's",
    upstream="megatron/training/models/dist_utils.py, _ddp_wrap; core/optimizer/layer_wise_optimizer.py, __init__",
    remove_when="_ddp_wrap knows use_layer_wise_distributed_optimizer, and Muon trains a float32 model with it",
    replacements=[
        Replacement("megatron.training.models.dist_utils:_ddp_wrap", _with_buffers_of_matrices),
        Replacement("megatron.training.models.dist_utils:DistributedOptimizer", _layer_wise),
        Replacement(
            "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.__init__", _of_whole_optimizers
        ),
    ],
)

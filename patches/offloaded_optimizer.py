"""Let Adam on the host serve models with float32 parameters among 16-bit ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement

_HYBRID = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer"


def _of_leaves(original: classmethod) -> classmethod:
    """A rank's part of a float32 parameter is a view of it, whose history a newly built optimizer refuses."""

    @functools.wraps(original.__func__)
    def build(cls: type, gbuf_ranges: Any, param_gbuf_map: Any, group_ranges: list[dict], config: Any) -> tuple:
        built = original.__func__(cls, gbuf_ranges, param_gbuf_map, group_ranges, config)
        for group_range, shards in zip(group_ranges, built[3], strict=True) if config.optimizer_cpu_offload else ():
            leaves = [_leaf(shard) for shard in shards]  # the first of their group
            group_range["orig_group"]["params"][: len(shards)] = shards[:] = leaves
        return built

    return classmethod(build)


def _leaf(view: torch.Tensor) -> torch.Tensor:
    leaf = view.detach()
    leaf.__dict__.update(view.__dict__)  # Megatron's marks
    return leaf


def _without_classes(original: Callable[..., None]) -> Callable[..., None]:
    """A group's options are saved, and a checkpoint holds no classes for its reader to run."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for group in self.param_groups:
            group.pop("cpu_optimizer_cls", None)
            group.pop("gpu_optimizer_cls", None)

    return init


def _with_those_in_place(original: Callable[..., None]) -> Callable[..., None]:
    """A float32 parameter that stays on the device has no copy, to which alone upstream hands the gradient."""

    @functools.wraps(original)
    def set_grads(self: Any) -> None:
        for param, inner in self.param_to_inner_param.items():
            if inner is param and getattr(param, "decoupled_grad", None) is not None:
                param.grad = param.decoupled_grad.to(param.dtype)
        original(self)

    return set_grads


def _from_state(_: Callable[..., None]) -> Callable[..., None]:
    def update(self: Any) -> None:
        for param, state in self.state.items():
            self.param_to_inner_param[param].data.copy_(state["master_param"])

    return update


def _from_model(_: Callable[..., None]) -> Callable[..., None]:
    def update(self: Any) -> None:
        for param, inner in self.param_to_inner_param.items():
            if inner is not param:
                inner.data.copy_(param)

    return update


def _with_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Without Transformer Engine a fresh optimizer is described by the steps of states that it does not have yet."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

        if isinstance(self.optimizer, HybridDeviceOptimizer) and not self.optimizer.state:
            self.optimizer.dummy_step()
        return original(self)

    return state_dict


offloaded_optimizer = Patch(
    name="offloaded_optimizer",
    reason="with optimizer_cpu_offload a model with A_log and dt_bias in float32 and the rest in bf16 is refused "
    "(can't optimize a non-leaf Tensor), does not train them on the device, does not load their states, and what it "
    "saves holds classes",
    upstream="megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py, and distrib_optimizer.py above it, "
    "_build_model_and_main_param_groups",
    remove_when="the hybrid optimizer knows parameters that need no float32 copy",
    replacements=[
        Replacement(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
            _of_leaves,
        ),
        Replacement("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict", _with_steps),
        Replacement(f"{_HYBRID}.__init__", _without_classes),
        Replacement(f"{_HYBRID}._set_sub_optimizer_grads", _with_those_in_place),
        Replacement(f"{_HYBRID}._update_fp32_params_by_new_state", _from_state),
        Replacement(f"{_HYBRID}.update_fp32_param_by_new_param", _from_model),
    ],
)

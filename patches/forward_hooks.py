"""Let evaluations and checkpoints come before the first step that counts, with an overlapped gather of parameters."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement


def _enable(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def enable_forward_pre_hook(self: Any) -> None:
        if not self.remove_forward_pre_hook_handles:
            original(self)

    return enable_forward_pre_hook


def _disable(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def disable_forward_pre_hook(self: Any, param_sync: bool = True) -> None:
        if self.remove_forward_pre_hook_handles:
            original(self, param_sync)
        elif param_sync:
            with torch.no_grad():
                self.start_param_sync(force_sync=True)

    return disable_forward_pre_hook


_MODEL = "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel"

forward_hooks = Patch(
    name="forward_hooks",
    reason="hooks that gather parameters are off until a step counts; an evaluation before that turns them off again",
    upstream="megatron/core/distributed/distributed_data_parallel.py, disable_forward_pre_hook; training.py, train",
    remove_when="Megatron's loop remembers whether it has turned the hooks on",
    replacements=[
        Replacement(f"{_MODEL}.enable_forward_pre_hook", _enable),
        Replacement(f"{_MODEL}.disable_forward_pre_hook", _disable),
    ],
)

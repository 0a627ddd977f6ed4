"""Tell the process group which GPU a process has, so that NCCL need not guess it at the first barrier."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_carve.patches.patch import Patch, Replacement


def _with_device(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend == "nccl" and kwargs.get("device_id") is None:
            kwargs["device_id"] = torch.device("cuda", torch.cuda.current_device())
        original(backend, *args, **kwargs)

    return init_process_group


process_group_device = Patch(
    name="process_group_device",
    reason="without a device torch warns at the first barrier that guessing it can cause a hang",
    upstream="megatron/training/initialize.py, _initialize_distributed",
    remove_when="Megatron gives init_process_group its device",
    replacements=[Replacement("megatron.training.initialize:torch.distributed.init_process_group", _with_device)],
)

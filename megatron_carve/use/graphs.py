"""What comes before a CUDA graph is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def rehearse(work: Callable[[], object], times: int) -> None:
    """Do `work` beside the current stream, so that nothing is compiled or set up while it is recorded.

    On one stream of the process: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen, for good.
    """
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            work()
    torch.cuda.current_stream().wait_stream(side)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""Kernels compiled before they are needed, side by side, where launches one after another would wait for each."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def compiling() -> Iterator[list[Future[Any]]]:
    """Within it, launches of Triton kernels by this thread launch nothing: what they need is compiled, by as many
    threads as there are processors. It ends when all is there.

    An op can so be called, forward and backward, for the kernels that a call like it will need; its results are
    whatever lay in memory.

    Yields:
        A list to which a future of Triton's CompiledKernel is added for each kernel that this process does not have.
    """
    launch, here = JITFunction.run, threading.get_ident()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=warmup or threading.get_ident() == here, **options)

    with (
        _Compilers(os.cpu_count()) as compilers,
        AsyncCompileMode(compilers),
        torch.autograd.set_multithreading_enabled(False),  # backward passes too run in this thread
    ):
        JITFunction.run = compile_only
        try:
            yield compilers.kernels
        finally:
            JITFunction.run = launch


class _Compilers(ThreadPoolExecutor):
    """Remembers what it was given. Threads will do, since compilers work outside Python for most of their time."""

    def __init__(self, threads: int | None) -> None:
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            super().__init__(threads, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
        else:
            super().__init__(threads)
        self.kernels: list[Future[Any]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(self._launchable, work, *args, **kwargs)
        self.kernels.append(future)
        return future

    def _launchable(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kernel = work(*args, **kwargs)
        if self.on_gpu:
            _ = kernel.run  # compiles the launcher, a C program, which a first launch would wait for
        return kernel

"""A launch starts the compiled kernel that Triton would have chosen, also where it does not ask for it again.

    python tests/support/compare_launches.py

A script of its own: where kernels have been interpreted, Triton compiles none in the same process.
"""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_carve.kernels.triton_backend import dynamic_convolution, gated_norm, launching, short_convolution
from megatron_carve.kernels.triton_backend.compiling import compiling
from megatron_carve.kernels.triton_backend.launching import launch


def add(x, y, z, n, scale, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    b_x = tl.load(x) * scale + n + WIDTH
    if z is not None:
        b_x += tl.load(z)
    tl.store(y, b_x)


class RecordingDriver:
    """A Hopper GPU's, for which kernels are compiled; what would be started is written down."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.device = 0
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (None, (device, hash(kernel)), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def start(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *hooks_and_args: Any) -> None:
            args = (a.data_ptr() if isinstance(a, Tensor) else a for a in hooks_and_args[3:])
            self.started.append((x, y, z, stream, function, packed, *args))

        return start


GPU = RecordingDriver()
asked: list[JITFunction] = []  # the kernels that Triton was asked to launch
run = JITFunction.run


def counted(self: JITFunction, *args: Any, **options: Any) -> Any:
    asked.append(self)
    return run(self, *args, **options)


def what_is_remembered_is_what_triton_chooses() -> None:
    kernel = JITFunction(add)
    memory = torch.zeros(64)
    y = torch.zeros(64)
    calls = [
        *product((memory, memory[1:], memory.bfloat16()), [None], [16], [0.5], [1], [4]),
        *product([memory], [None, y[1:], y], [0, 1, 2, 2**31], [0.5], [1], [4]),
        *product([memory], [None], [16], [0.5, 1, 1.0, 2], [1], [4]),
        *product([memory], [None], [16], [0.5], [1, 2], [4, 1]),
    ]
    chosen: list[Any] = []
    for again in (False, True):
        for GPU.device in (0, 1):
            for x, z, n, scale, width, warps in calls:
                GPU.started.clear()
                asked.clear()
                launch(kernel, (3, 2), x, y, z, n, scale, WIDTH=width, num_warps=warps)
                unaligned = any(t is not None and t.data_ptr() % 16 for t in (x, z))
                assert not again or len(asked) == unaligned
                kernel[3, 2](x, y, z, n, scale, WIDTH=width, num_warps=warps)
                ours, tritons = GPU.started
                assert ours == tritons
                chosen.append(ours[4])
    assert len(set(chosen)) >= 2 * 12


def arguments_by_name_are_not_remembered() -> None:
    x = torch.zeros(4)
    try:
        launch(JITFunction(add), (1,), x, x, z=x, n=3, scale=0.5, WIDTH=1)
    except AssertionError as error:
        assert str(error) == "add: an argument by name would be remembered"
    else:
        raise AssertionError("launched")


def others_may_take_launches_over() -> None:
    kernel, x = JITFunction(add), torch.zeros(4)

    def launches() -> int:
        asked.clear()
        launch(kernel, (1,), x, x, None, 3, 0.5, WIDTH=1)
        return len(asked)

    assert (launches(), launches()) == (1, 0)
    kernel.add_pre_run_hook(lambda *args, **options: None)
    assert launches() == 1
    kernel.pre_run_hooks.clear()
    watcher = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(watcher)
    try:
        assert launches() == 1
    finally:
        knobs.runtime.launch_enter_hook.remove(watcher)
    assert launches() == 0
    GPU.started.clear()
    with compiling() as compiled:
        launch(kernel, (1,), x, x, None, 5, 0.5, WIDTH=2)
        assert launches() == 1
    assert len(compiled) == 1 and not GPU.started


def what_surrounds_the_chunk_ops_launches_as_triton_does() -> None:
    def compared(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        GPU.started.clear()
        asked.clear()
        launch(kernel, grid, *args, **options)
        first_of_a_kind.append(len(asked))
        kernel[grid](*args, **options)
        ours, tritons = GPU.started
        assert ours == tritons, kernel

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    for module in (dynamic_convolution, gated_norm, short_convolution):
        module.launch = compared  # type: ignore[attr-defined]
    x, taps, heads = leaf(1, 64, 192), leaf(192, 4), leaf(1, 64, 3, 64)
    for ends, bias in ((None, None), (torch.tensor([0, 5, 64]), leaf(192))):
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (short_convolution.ConvolveQKV, (x, taps, bias, ends, 64, 64)),
            (gated_norm.GatedNorm, (heads, None if ends is None else leaf(1, 64, 3, 64), leaf(64), 1e-5, "silu")),
        ]
        if ends is not None:
            features, up = leaf(1, 64, 48), leaf(192, 4, 16)
            calls.append((dynamic_convolution.DynamicConvolveQKV, (x, features, taps, up, bias, ends, 64, 64)))
        for op, given in calls:
            launches = []
            for _ in range(2):
                first_of_a_kind: list[int] = []
                out = op.apply(*given)
                out = out if isinstance(out, tuple) else (out,)
                torch.autograd.grad(out, [given[0]], [torch.zeros_like(part) for part in out])
                launches.append(first_of_a_kind)
            first, again = launches
            assert len(first) == len(again) >= 2 and any(first) and not any(again), op


if __name__ == "__main__":
    driver.set_active(GPU)
    JITFunction.run = launching._run = counted
    what_is_remembered_is_what_triton_chooses()
    arguments_by_name_are_not_remembered()
    what_surrounds_the_chunk_ops_launches_as_triton_does()
    others_may_take_launches_over()

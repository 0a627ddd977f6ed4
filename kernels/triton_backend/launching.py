"""Launches that ask Triton once which compiled kernel they need.

Triton finds that out anew at every launch, which takes the CPU three times as long as to start the kernel. Here it is
remembered for all that the choice depends on: dtypes, numbers, options, device. Addresses count as well: only launches
whose tensors all lie at multiples of 16 bytes are remembered, as memory from torch does. Numbers count by their value,
so that nothing is assumed about which of them Triton compiles for.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Those in which a compiled kernel is started as here, with addresses in the place of tensors; others launch by
# themselves.
KNOWN_VERSIONS = ("3.5", "3.6", "3.7", "3.8")
# Launches of other sizes each; then they are forgotten.
MOST = 8192

_run = JITFunction.run if triton.__version__.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS)) else None
_remembered: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), where the options name all compile-time constants of the kernel and no other
    argument; what Triton reads from the environment is read at the first launch of a kind."""
    if torch.compiler.is_compiling() or not _launches_alone(kernel):
        kernel[grid](*args, **options)
        return
    device = driver.active.get_current_device()
    kinds: list[Any] = [kernel.fn, device]
    values = []
    addresses = 0
    for x in args:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            addresses |= address
            values.append(address)
            kinds.append(x.dtype)
            continue
        values.append(x)
        if isinstance(x, TensorDescriptor):
            kinds += TensorDescriptor, x.base.dtype, *x.block_shape, x.padding
        else:
            kinds += type(x), x
    if addresses % 16:
        kernel[grid](*args, **options)
        return
    key = (*kinds, *options, *options.values())
    found = _remembered.get(key)
    if found is None:
        named = kernel.params[len(args) :]
        assert all(p.is_constexpr for p in named), f"{kernel.__name__}: an argument by name would be remembered"
        compiled = kernel[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            if len(_remembered) >= MOST:
                _remembered.clear()
            _remembered[key] = compiled, tuple(options[p.name] for p in named)
        return
    compiled, constants = found
    compiled.run(
        *grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device),
        compiled.function, compiled.packed_metadata,
        None, None, None,  # what those get who watch launches, and they: see _launches_alone
        *values, *constants,
    )  # fmt: skip


def _launches_alone(kernel: Any) -> bool:
    """Whether nothing but the kernel's start belongs to a launch: it is compiled, by Triton itself (see compiling.py),
    in a version that is known, and nobody watches or changes launches."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        type(kernel) is JITFunction
        and JITFunction.run is _run
        and not kernel.pre_run_hooks
        and not getattr(before, "calls", before)
        and not getattr(after, "calls", after)
        and getattr(runtime, "add_stages_inspection_hook", None) is None
        and not runtime.debug
        and "instrumentation_mode" not in vars(knobs.compilation)
    )

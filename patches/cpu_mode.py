"""Run Megatron-Core and its training loop on the CPU, where it asks for CUDA by name."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_carve.patches.patch import Patch, PatchError, Replacement


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaTensorsOnCpu(TorchFunctionMode):
    """Redirects every tensor call that names a CUDA device, so that no factory function needs a patch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], int) and _means_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if kwargs and _means_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and "cuda" not in result:
            # Megatron's optimizers sort parameters by the names of CUDA tensor types.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """Everything is synchronous: streams and events have nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 0.0


def _context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _seed(seed: int) -> None:
    # Not torch.manual_seed, which calls torch.cuda.manual_seed_all, that is, this function.
    torch.default_generator.manual_seed(int(seed))


def _with_numpy(move: Callable[..., Any]) -> Callable[..., Any]:
    """What is on the CPU already is made an array too where one is asked for."""

    @functools.wraps(move)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


_PROPERTIES = SimpleNamespace(major=0, minor=0, total_memory=0, multi_processor_count=1, name="cpu")

# torch.cuda's functions by what they do here.
_TORCH_CUDA: dict[str, Any] = {
    "is_available": lambda: False,
    "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    "current_device": lambda: torch.device("cpu"),
    "get_device_properties": lambda *a, **k: _PROPERTIES,
    "get_device_capability": lambda *a, **k: (0, 0),
    "get_device_name": lambda *a, **k: "cpu",
    "manual_seed": _seed,
    "manual_seed_all": _seed,
    "get_rng_state": lambda *a, **k: torch.get_rng_state(),
    "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
    "random.get_rng_state": lambda *a, **k: torch.get_rng_state(),
    "current_stream": lambda *a, **k: _Stream(),
    "default_stream": lambda *a, **k: _Stream(),
    "is_current_stream_capturing": lambda: False,
    "Stream": _Stream,
    "Event": _Event,
    "stream": _context,
    "device": _context,
    "memory_stats": lambda *a, **k: collections.defaultdict(int),
    "mem_get_info": lambda *a, **k: (0, 0),
    "nvtx.range_push": lambda *a, **k: 0,
    "nvtx.range_pop": lambda *a, **k: 0,
    **{name: lambda *a, **k: None for name in ("set_device", "synchronize", "empty_cache", "ipc_collect")},
    **{name: lambda *a, **k: None for name in ("reset_peak_memory_stats", "reset_max_memory_allocated")},
    **{
        name: lambda *a, **k: 0
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    },
}


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


_GPU_LIBRARIES = ("transformer_engine", "apex")
_mode = _CudaTensorsOnCpu()
_entered: dict[str, bool] = {}
_tracker_logger = logging.getLogger("megatron.core.tensor_parallel.random")


def _enter() -> None:
    # Where these are installed Megatron takes kernels from them that crash on CPU tensors; a None in sys.modules
    # makes their import fail, and Megatron then uses its own code.
    for library in _GPU_LIBRARIES:
        if sys.modules.get(library) is not None:
            raise PatchError(f"patch cpu_mode: must be applied before {library} is imported")
    sys.modules.update(dict.fromkeys(_GPU_LIBRARIES))  # type: ignore[arg-type]
    _mode.__enter__()
    _entered["mode"] = True
    # CPU and "GPU" random states are one here; the tracker warns about that at every fork.
    _tracker_logger.setLevel(logging.ERROR)


def _leave() -> None:
    for library in _GPU_LIBRARIES:
        if sys.modules.get(library, "") is None:
            del sys.modules[library]
    if _entered.pop("mode", None):
        _mode.__exit__(None, None, None)
    _tracker_logger.setLevel(logging.NOTSET)


@contextlib.contextmanager
def cpu_mode_in_this_thread() -> Iterator[None]:
    """For a thread other than the one that applied the patch, if it is applied: torch has such modes by thread."""
    with _CudaTensorsOnCpu() if _entered else contextlib.nullcontext():
        yield


cpu_mode = Patch(
    name="cpu_mode",
    reason="Megatron-Core names CUDA devices, streams and random states throughout",
    upstream="megatron/core/tensor_parallel/random.py, megatron/training/initialize.py and many others",
    remove_when="Megatron-Core takes its device from the configuration",
    replacements=[
        *(Replacement(f"torch.cuda:{name}", _constant(value)) for name, value in _TORCH_CUDA.items()),
        Replacement(
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            _constant(lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
        ),
        Replacement(
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            _constant(lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()),
        ),
        Replacement("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", _with_numpy),
        Replacement(
            "megatron.training.training:initialize_megatron",
            lambda initialize: functools.partial(initialize, allow_no_cuda=True),
        ),
    ],
    on_apply=_enter,
    on_revert=_leave,
)

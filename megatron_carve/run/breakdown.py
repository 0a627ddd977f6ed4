"""Which part of a model a profiled step spends its time in.

Modules are wrapped in named ranges. What runs inside a range belongs to it; a step of the backward belongs to the range
in which the operation that it differentiates ran, which the profiler's sequence numbers tell.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.autograd import DeviceType

from megatron_carve.model.mixers.base import LinearAttentionMixer

PREFIX = "megatron_carve part: "

OP = "mixer op"
PROJECTIONS = "mixer projections"
CONVOLUTION = "mixer convolution and norms"
MIXER = "mixer, the rest"
MLP_PART = "MLP"
ATTENTION = "attention"
LAYER = "norms and residuals between layers"
ENDS = "embedding, output and loss"
STEP = "gradient sums, optimizer, the rest"
PARTS = (OP, PROJECTIONS, CONVOLUTION, MIXER, MLP_PART, ATTENTION, LAYER, ENDS, STEP)

# cudaLaunchKernel and its like: numbered apart from operations, each as the kernel that it starts.
_CUDA_CALL = re.compile("cu(da)?[A-Z]")

# Attributes of a mixer: a module, whose forward is meant, or a method.
_OF_A_MIXER = {
    OP: ("mix",),
    PROJECTIONS: ("in_proj", "out_proj", "decay_up", "gate_up"),
    CONVOLUTION: ("conv", "out_norm"),
}


def mark_parts(model: nn.Module) -> None:
    """Wrap the parts of a built model in ranges that `time_by_part` knows. Once for a model; it stays so."""
    _wrap(model, "forward", ENDS)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            _wrap(module, "forward", LAYER)
        elif isinstance(module, MLP | BaseMoELayer):
            _wrap(module, "forward", MLP_PART)
        elif isinstance(module, Attention):
            _wrap(module, "forward", ATTENTION)
        elif isinstance(module, LinearAttentionMixer):
            _wrap(module, "forward", MIXER)
            for part, names in _OF_A_MIXER.items():
                for name in names:
                    inner = getattr(module, name, None)
                    if isinstance(inner, nn.Module):
                        _wrap(inner, "forward", part)
                    elif inner is not None:
                        _wrap(module, name, part)


def time_by_part(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by part, of PARTS, in the events of a torch.profiler.profile.

    Of the GPU's work where there is any, summed up over streams; else of the CPU's operations. What no range covers is
    STEP's.
    """
    events = list(events)
    on_cpu, calls, on_gpu = [], {}, []
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                on_gpu.append(event)
        elif _CUDA_CALL.match(event.name):
            calls[event.id] = event
        else:
            on_cpu.append(event)
    on_cpu.sort(key=lambda e: e.time_range.start)
    # Operations that make no node peek at the number of the next one, so the last with a number made its node.
    forward_part = {}
    for event in on_cpu:
        if event.sequence_nr >= 0 and not _is_backward(event):
            forward_part[event.thread, event.sequence_nr] = _part(event, {})
    seconds = dict.fromkeys(PARTS, 0.0)
    # A kernel belongs where it was started. The operation that torch links it to may lie far outside of that: without
    # gradients, as in recomputed layers, Transformer Engine's products run in no operation of their own.
    for event in on_gpu or on_cpu:
        around = calls.get(event.id) if on_gpu else event
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        seconds[_part(around, forward_part) or STEP] += own / 1e6
    return seconds


def longest_kernels(events: Iterable[Any], count: int) -> list[tuple[str, float]]:
    """(name, seconds) of the GPU's kernels, or the CPU's operations, that take longest, each name summed up."""
    events = list(events)
    on_gpu = any(e.device_type != DeviceType.CPU for e in events)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.is_user_annotation or (event.device_type == DeviceType.CPU) == on_gpu:
            continue
        seconds[event.name] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6
    return sorted(seconds.items(), key=lambda item: -item[1])[:count]


def _wrap(module: nn.Module, method: str, part: str) -> None:
    inner: Callable[..., Any] = getattr(module, method)

    @functools.wraps(inner)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(PREFIX + part):
            return inner(*args, **kwargs)

    setattr(module, method, in_range)


def _part(event: Any, forward_part: dict[tuple[int, int], str | None]) -> str | None:
    """The part of the innermost range, or node of the backward, around an event."""
    for around in _outwards(event):
        if around.name.startswith(PREFIX):
            return around.name.removeprefix(PREFIX)
        if _is_backward(around) and (around.fwd_thread, around.sequence_nr) in forward_part:
            return forward_part[around.fwd_thread, around.sequence_nr]
    return None


def _outwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: Any) -> bool:
    return event.fwd_thread > 0  # threads are counted from 1

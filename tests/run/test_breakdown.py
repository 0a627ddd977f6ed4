"""Where a profiled step's time goes: by the range it ran in, in the forward, the backward and recomputation."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval
from torch.profiler import profile, record_function
from torch.utils.checkpoint import checkpoint

from megatron_carve.run.breakdown import ATTENTION, MLP_PART, OP, PARTS, PREFIX, STEP, longest_kernels, time_by_part


class Heavy(torch.autograd.Function):
    """A product whose backward is two products, in Python as Triton's ops are."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


def heavy_step(kind: str) -> dict[str, float]:
    """Parts of a step whose every product of large matrices belongs to the MLP."""
    x, w = (torch.randn(1280, 1280, requires_grad=True) for _ in range(2))  # large: other processes delay the rest

    def mlp(x):
        with record_function(PREFIX + MLP_PART):
            if kind == "function":
                return Heavy.apply(Heavy.apply(x, w), w)
            return x @ w @ w

    with profile() as profiler:
        with record_function(PREFIX + ATTENTION):
            y = (x[:8] + 1).exp()
            if kind == "reentrant" or kind == "recomputed":
                z = checkpoint(mlp, x, use_reentrant=kind == "reentrant")
            else:
                z = mlp(x)
        with torch.no_grad():  # makes no node, and peeks at the number of the next
            y.detach().cos()
        with record_function(PREFIX + OP):
            out = (z[:8] * y).sum()
        out.backward()
    events = profiler.events()
    assert "aten::mm" in [name for name, _ in longest_kernels(events, 3)]
    return time_by_part(events)


@pytest.mark.parametrize("kind", ["plain", "function", "recomputed", "reentrant"])
def test_a_backward_belongs_to_the_part_of_its_forward(kind):
    heavy_step(kind)  # the first use of the profiler and of the products takes longer
    parts = heavy_step(kind)
    assert list(parts) == list(PARTS)
    assert parts[MLP_PART] > 0.75 * sum(parts.values())
    assert parts[ATTENTION] > 0 and parts[OP] > 0
    assert parts[STEP] < 0.15 * sum(parts.values())


def event(name, start, **fields):
    """An event as torch's profiler gives it."""
    plain = {"device_type": DeviceType.CPU, "is_user_annotation": False, "cpu_parent": None, "id": 0,
             "sequence_nr": -1, "fwd_thread": 0, "thread": 1}  # fmt: skip
    return SimpleNamespace(name=name, time_range=Interval(start, start + 10), **{**plain, **fields})


def test_a_kernel_belongs_to_the_range_that_launched_it():
    """Whatever operation bears the number of its launch, and also where no operation is around that; else the step."""
    device = {"device_type": DeviceType.CUDA}
    kernel, unknown = event("kernel", 20, id=7, **device), event("unknown", 40, id=8, **device)
    layer = event("CheckpointFunction", 0, id=3, sequence_nr=5)
    part = event(PREFIX + OP, 1, is_user_annotation=True, cpu_parent=layer)
    call = event("cuLaunchKernelEx", 2, id=7, cpu_parent=part)
    other = event("aten::view", 30, id=7)
    events = [layer, part, call, other, kernel, unknown, event(PREFIX + OP, 0, is_user_annotation=True, **device)]
    parts = time_by_part(events)
    assert parts == {**dict.fromkeys(PARTS, 0.0), OP: pytest.approx(1e-5), STEP: pytest.approx(1e-5)}
    assert longest_kernels(events, 1) == [("kernel", pytest.approx(1e-5))]


def test_work_outside_of_every_part_is_the_steps():
    with profile() as profiler:
        torch.randn(512, 512) @ torch.randn(512, 512)
    parts = time_by_part(profiler.events())
    assert parts[STEP] == sum(parts.values()) > 0

"""Adam on the host, in Megatron's hybrid optimizer, of a layer whose decay is float32 and whose rest is bfloat16."""

import copy

import pytest
import torch
from support.models import config, hybrid_model, one_process
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_carve import patches


class TwoMemories(TorchFunctionMode):
    """Tensors say that they lie on a GPU, but those that come of .cpu()."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: dict[int, Tensor] = {}  # held, so that no other takes its id

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.is_cuda.__get__:
            return id(args[0]) not in self.on_host
        result = func(*args, **(kwargs or {}))
        if func is Tensor.cpu and result is args[0]:
            result = result.clone()
        if func is Tensor.cpu or (isinstance(result, Tensor) and args and id(args[0]) in self.on_host):
            self.on_host[id(result)] = result
        return result


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        patches.offloaded_optimizer.apply()
        yield
        patches.offloaded_optimizer.revert()


def build(offload_fraction=None):
    """(the model, Megatron's distributed optimizer of it), without a fraction with Adam where the model is."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    torch.manual_seed(3)
    model = hybrid_model("C", params_dtype=torch.bfloat16, bf16=True)
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p))
    spread = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    offload = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
    options = OptimizerConfig(
        optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.0, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=True, **({} if offload_fraction is None else offload),
        optimizer_offload_fraction=offload_fraction or 0.0, overlap_cpu_optimizer_d2h_h2d=False,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [DistributedDataParallel(config(), spread, model)])
    return model, optimizer.chained_optimizers[0]


def step(model, optimizer, count, seed=0):
    for i in range(count):
        generator = torch.Generator().manual_seed(seed + i)
        for p in model.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        rtol = 1e-6 if p.dtype == torch.float32 else 2**-7  # of bfloat16 the last place
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_it_trains_as_adam_on_the_device(fraction):
    expected = build()
    step(*expected, 3)
    with TwoMemories():
        found = build(fraction)
        step(*found, 3)
    assert_same(found[0], expected[0])


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_loaded_it_goes_on(fraction):
    with TwoMemories():
        saved, loaded = build(fraction), build(fraction)
        loaded[1].state_dict()  # as Megatron asks, to know what to load
        step(*saved, 2)
        step(*loaded, 1, seed=9)
        states = copy.deepcopy(saved[1].optimizer.state_dict())
        assert not any(isinstance(x, type) for group in states["param_groups"] for x in group.values())
        for p, q in zip(loaded[0].parameters(), saved[0].parameters(), strict=True):
            p.data.copy_(q)
        loaded[1].optimizer.load_state_dict(states)
        for model, optimizer in (saved, loaded):
            step(model, optimizer, 2, seed=2)
    assert_same(loaded[0], saved[0])


def test_weights_alone_are_taken_over():
    with TwoMemories():
        model, optimizer = build(1.0)
        for p in model.parameters():
            p.data.fill_(0.5)
        optimizer.reload_model_params()
        for p in model.parameters():
            p.main_grad.zero_()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.sub(0.5).abs().max() < 0.01, name

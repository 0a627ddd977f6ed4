"""Megatron-Core without a GPU, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

CPU_MODE = """
import json, os, sys, types
import torch
from torch.overrides import _get_current_function_mode_stack
from megatron_carve import patches

def torch_cuda():
    places = {"": torch.cuda, "random.": torch.cuda.random, "nvtx.": torch.cuda.nvtx}
    return {p + name: value for p, module in places.items() for name, value in vars(module).items()}

def cuda_tensor():
    try:
        return torch.zeros(1, device="cuda").device.type
    except (RuntimeError, AssertionError):
        return "refused"

facts = {}
here = torch.cuda.is_available()
before, modes = torch_cuda(), len(_get_current_function_mode_stack())

# Refused where a library that Megatron would use is loaded already; nothing has happened then.
sys.modules["transformer_engine"] = loaded = types.ModuleType("transformer_engine")
try:
    patches.cpu_mode.apply()
except RuntimeError as error:
    facts["refused"] = str(error)
facts["kept_library"] = sys.modules.pop("transformer_engine") is loaded
facts["refused_changes"] = [n for n, v in torch_cuda().items() if before.get(n) is not v]
facts["refused_modes"] = len(_get_current_function_mode_stack()) - modes

sys.modules["apex"] = types.ModuleType("apex")
try:
    patches.cpu_mode.apply()
except RuntimeError as error:
    facts["refused_apex"] = str(error)
del sys.modules["apex"]
facts["left_by_apex"] = "transformer_engine" in sys.modules
sys.modules.pop("transformer_engine", None)

patches.cpu_mode.apply()
x = torch.ones(2)
facts["devices"] = {
    "zeros": str(torch.zeros(1, device="cuda").device),
    "numbered": str(torch.zeros(1, device="cuda:3").device),
    "device object": str(torch.ones(1, device=torch.device("cuda", 0)).device),
    "index": str(torch.full((2,), 1.0, device=0).device),
    "current": str(torch.empty(2, device=torch.cuda.current_device()).device),
    "from data": str(torch.tensor([1.0], device="cuda").device),
    "like": str(torch.zeros_like(x, device="cuda").device),
    "to": str(x.to("cuda").device),
    "to by keyword": str(x.to(device="cuda", dtype=torch.float64).device),
    "cuda": str(x.cuda().device),
    "pinned": str(torch.empty(2, pin_memory=True).device),
    "pin_memory": str(x.pin_memory().device),
    "none": str(torch.zeros(1).device),
    "meta": str(torch.zeros(1, device="meta").device),
    "module": str(torch.nn.Linear(2, 2, device="cuda").cuda().weight.device),
}

def in_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    def look():
        with patches.cpu_mode_in_this_thread():
            inside = cuda_tensor(), torch.empty(2, pin_memory=True).device.type
        return [*inside, len(_get_current_function_mode_stack())]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(look).result()

facts["another_thread"] = in_another_thread()
double = torch.zeros(1, dtype=torch.float64)
facts["values"] = [
    x.cuda() is x, x.to("cuda", torch.float64).dtype == torch.float64, x.to(torch.int32).dtype == torch.int32,
    x.to(double).dtype == torch.float64, torch.full((2,), 7, device="cuda").tolist() == [7, 7],
]
facts["type"] = [x.type(), x.bfloat16().type(), x.type(torch.float64).dtype == torch.float64]
c = torch.cuda
facts["answers"] = [
    c.is_available(), c.device_count(), c.get_device_properties(0).major, list(c.get_device_capability()),
    c.get_device_name(), c.memory_allocated(), c.max_memory_reserved(), list(c.mem_get_info()),
    c.memory_stats()["anything"], c.synchronize(), c.set_device(0), c.empty_cache(), c.is_current_stream_capturing(),
    c.current_stream().query(), c.Event(enable_timing=True).elapsed_time(c.Event()), c.nvtx.range_push("x"),
    c.nvtx.range_pop(),
]
with c.stream(c.Stream()), c.device(0), c.Stream() as stream:
    stream.wait_stream(c.current_stream())
    stream.record_event().wait()

torch.manual_seed(5)
expected = torch.rand(3)
draws = []
for seed in (c.manual_seed, c.manual_seed_all):
    seed(5)
    draws.append(torch.equal(torch.rand(3), expected))
state = c.get_rng_state()
drawn = torch.rand(3)
c.set_rng_state(state)
draws.append(torch.equal(torch.rand(3), drawn))
from megatron.core.tensor_parallel import random
random._set_cuda_rng_state(state)
draws.append(torch.equal(torch.rand(3), drawn))
c.set_rng_state(state)
draws.append(torch.equal(random._get_cuda_rng_state(), state))
facts["draws"] = draws

for library in ("transformer_engine", "apex"):
    try:
        __import__(library)
        facts[library] = "imported"
    except ImportError:
        facts[library] = "refused"
from megatron.training import training
facts["initialize"] = training.initialize_megatron.keywords
patched = training.initialize_megatron
patches.cpu_mode.apply()
facts["once"] = training.initialize_megatron is patched

patches.cpu_mode.revert()
facts["left"] = [n for n, v in before.items() if torch_cuda().get(n) is not v]
facts["added"] = [n for n, v in torch_cuda().items() if n not in before and not isinstance(v, types.ModuleType)]
facts["available_again"] = torch.cuda.is_available() == here
facts["modes"] = len(_get_current_function_mode_stack()) - modes
facts["libraries"] = [name in sys.modules for name in ("transformer_engine", "apex")]
facts["cuda_again"] = cuda_tensor() == ("cuda" if here else "refused")
facts["type_again"] = x.type()
facts["initialize_again"] = training.initialize_megatron.__name__
print(json.dumps(facts))
"""


class TestCpuMode:
    @pytest.fixture(scope="class")
    def facts(self):
        """What a process of its own saw before, under and after the CPU mode."""
        run = subprocess.run(
            [sys.executable, "-c", CPU_MODE], capture_output=True, text=True, timeout=300,
            env={**os.environ, "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.splitlines()[-1])

    def test_tensors_land_on_the_cpu(self, facts):
        elsewhere = {name: device for name, device in facts["devices"].items() if device != "cpu"}
        assert elsewhere == {"meta": "meta"}
        assert len(facts["devices"]) == 15
        assert facts["values"] == [True] * 5

    def test_another_thread_asks_for_it(self, facts):
        assert facts["another_thread"] == ["cpu", "cpu", 0]

    def test_types_are_named_as_megatrons_optimizers_expect(self, facts):
        assert facts["type"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", True]

    def test_torch_cuda_answers(self, facts):
        assert facts["answers"] == [
            False, 3, 0, [0, 0], "cpu", 0, 0, [0, 0], 0, None, None, None, False, True, 0.0, 0, 0
        ]  # fmt: skip

    def test_there_is_one_random_state(self, facts):
        assert facts["draws"] == [True] * 5

    def test_megatron_starts_without_a_gpu_and_without_gpu_libraries(self, facts):
        assert facts["initialize"] == {"allow_no_cuda": True}
        assert (facts["transformer_engine"], facts["apex"]) == ("refused", "refused")
        assert facts["once"]

    def test_comes_off_without_a_trace(self, facts):
        assert facts["left"] == []
        assert facts["added"] == []
        assert facts["available_again"]
        assert facts["modes"] == 0
        assert facts["libraries"] == [False, False]
        assert facts["cuda_again"]
        assert facts["type_again"] == "torch.FloatTensor"
        assert facts["initialize_again"] == "initialize_megatron"

    def test_too_late_after_transformer_engine(self, facts):
        assert facts["refused"] == "patch cpu_mode: must be applied before transformer_engine is imported"
        assert facts["kept_library"]
        assert facts["refused_changes"] == []
        assert facts["refused_modes"] == 0

    def test_too_late_after_apex(self, facts):
        assert facts["refused_apex"] == "patch cpu_mode: must be applied before apex is imported"

    def test_a_refusal_blocks_no_library(self, facts):
        assert facts["left_by_apex"] is False

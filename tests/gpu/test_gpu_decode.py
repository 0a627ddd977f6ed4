"""Decoding on a GPU at a real size: 80 steps in place against the float64 recurrence, and a replayed CUDA graph."""

from typing import Any

import pytest
import torch
from support.inputs import FORMS, OpInputs, in_float64, make_inputs, named_outputs
from support.interpreter import DEVICE
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import assert_close
from torch import Tensor

from megatron_carve.kernels import CarveState, recurrent_carve, recurrent_gdn2

pytestmark = pytest.mark.gpu

ALL = pytest.mark.parametrize("form", FORMS)
DECODE = {"gdn2": recurrent_gdn2, "carve": recurrent_carve}
ORACLE = {"gdn2": oracle_gdn2, "carve": oracle_carve}


def full_size(form: str, steps: int, **options: Any) -> OpInputs:
    """Batch 64, 16 value heads on 8 key heads, K = V = 128, bfloat16 with float32 gates, counts all over the chunk."""
    inputs = make_inputs(
        form, B=64, T=steps, H=8, HV=16, K=128, V=128, rank=16, counts=list(range(64)),
        dtype=torch.bfloat16, gate_dtype=torch.float32, **options,
    )  # fmt: skip
    if inputs.op == "carve":
        # the content term grows with V and R: back to the size it has at the widths of the other tests
        inputs = inputs.with_tensors(content_up=inputs.tensors["content_up"] / 16)
    inputs = inputs.map_floats(lambda x: x.to(DEVICE))
    if inputs.op == "carve":
        inputs = inputs.with_state(CarveState(**{**inputs.state, "count": inputs.state["count"].to(DEVICE)}))
    return inputs


def step_in_place(inputs: OpInputs) -> Tensor:
    """One call on the first token of `inputs`; returns o and leaves the new state in inputs.state."""
    return inputs.call(DECODE[inputs.op], CarveState, inplace_state=True, backend="triton")[0]


@ALL
def test_many_steps_against_the_recurrence(form: str) -> None:
    inputs = full_size(form, 80)
    expected = named_outputs(in_float64(inputs).call(ORACLE[inputs.op]))
    outputs = [step_in_place(inputs.tokens(t, t + 1)) for t in range(80)]
    found = {"o": torch.cat(outputs, 1), **inputs.state}
    if inputs.op == "carve":
        expected["count"] = expected["count"].to(DEVICE)
    assert_close(found, expected, "bfloat16")


@ALL
def test_a_replayed_cuda_graph_equals_eager_steps(form: str) -> None:
    inputs = full_size(form, 70)
    names = [name for name in inputs.tensors if not name.startswith("content")]
    static = inputs.tokens(0, 1).map_floats(Tensor.clone)
    static.state.update({name: x.clone() for name, x in static.state.items()})
    state_before = {name: x.clone() for name, x in inputs.state.items()}

    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        step_in_place(static)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step_in_place(static)
    for name, x in static.state.items():
        x.copy_(state_before[name])

    for t in range(70):
        token = inputs.tokens(t, t + 1)
        for name in names:
            static.tensors[name].copy_(token.tensors[name])
        graph.replay()
        assert torch.equal(o, step_in_place(token)), f"step {t}"
    for name, x in inputs.state.items():
        assert torch.equal(static.state[name], x), name

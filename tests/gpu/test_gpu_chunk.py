"""The Triton chunk ops on a GPU: values and gradients against float64 in every dtype, and the properties of the ops.

The truth is the torch backend in float64, which the other tests compare with a token-by-token oracle; tolerances are
those of support/rounding.py.
"""

import re
from typing import Any

import pytest
import torch
from support.gpu import assert_no_host_synchronisation, memory_of_nan
from support.inputs import FORMS, OpInputs, in_float64, make_inputs, run_with_grads
from support.interpreter import DEVICE
from support.rounding import FLOORS, assert_rounded_alike, rms_error

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2, require_triton_support
from megatron_carve.kernels.triton_backend import segments

pytestmark = pytest.mark.gpu

OPS = {"gdn2": chunk_gdn2, "carve": chunk_carve}
ALL_FORMS = pytest.mark.parametrize("form", FORMS)
CARVE_FORMS = [form for form in FORMS if form != "gdn2"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

CASES: dict[str, dict[str, Any]] = {
    "128": {"B": 2, "T": 300, "H": 2, "K": 128, "V": 128},
    "32": {"B": 1, "T": 200, "H": 2, "K": 32, "V": 32},
    "64x96": {"B": 1, "T": 130, "H": 2, "K": 64, "V": 96},
    "96x64": {"B": 1, "T": 130, "H": 2, "K": 96, "V": 64},
    "grouped state": {"B": 2, "T": 150, "H": 1, "HV": 3, "K": 128, "V": 64, "initial_state": True},
    "packed": {"lengths": [1, 190, 0, 64, 65, 3], "H": 2, "K": 128, "V": 128, "initial_state": True},
    "steep": {"B": 1, "T": 200, "H": 2, "K": 128, "V": 128, "decay": "steep", "erase": "extreme", "zero_keys": True},
    "brisk": {"B": 1, "T": 200, "H": 2, "K": 128, "V": 128, "decay": "brisk"},
    "by chunk": {"B": 1, "T": 600, "H": 2, "K": 128, "V": 128, "decay": "by chunk"},
    "uneven": {"B": 1, "T": 200, "H": 2, "K": 128, "V": 128, "decay": "uneven", "initial_state": True},
    "one token": {"B": 2, "T": 1, "H": 2, "K": 128, "V": 128},
    "256": {"B": 1, "T": 130, "H": 1, "K": 256, "V": 256, "initial_state": True},
    "64x256": {"B": 1, "T": 130, "H": 1, "HV": 2, "K": 64, "V": 256, "initial_state": True},
    "segments": {"B": 1, "T": 2100, "H": 1, "HV": 2, "K": 128, "V": 128, "decay": "none"},
}
GDN2_CASES = CASES | {
    "vector gate": {"B": 2, "T": 150, "H": 1, "HV": 2, "K": 128, "V": 128, "short_w": False},
    "wide vector gate": {"B": 2, "T": 70, "H": 1, "K": 32, "V": 256, "short_w": False, "initial_state": True},
    "erase gate of one number": {"B": 2, "T": 150, "H": 1, "HV": 2, "K": 128, "V": 128, "short_b": True},
}
CARVE_CASES = CASES | {
    "content 128": {"B": 2, "T": 300, "H": 2, "K": 128, "V": 128, "content_chunk": 128, "counts": [5, 70]},
    "content 192": {"B": 2, "T": 430, "H": 2, "K": 128, "V": 128, "content_chunk": 192, "decay": "none"},
    "packed content 128": CASES["packed"] | {"content_chunk": 128, "counts": [0, 5, 70, 64, 100, 127]},
    "content of every head": {"B": 2, "T": 300, "H": 2, "K": 64, "V": 64, "content_heads": True},
    "strong erase": {"B": 2, "T": 300, "H": 2, "K": 128, "V": 128, "content_chunk": 128, "erase": "strong"},
    "detached": {"B": 2, "T": 300, "H": 2, "K": 128, "V": 128, "content_grad": "detached"},
    "segments detached": CASES["segments"] | {"content_grad": "detached"},
}
ALL = [(form, name) for form in FORMS for name in (GDN2_CASES if form == "gdn2" else CARVE_CASES)]


memory_starts_as_nan = pytest.fixture(autouse=True)(memory_of_nan)


def draw(form: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> OpInputs:
    inputs = make_inputs(form, dtype=dtype, rank=3 if form == "gdn2" else 16, **options)
    if inputs.op == "carve":
        # the content term grows with the square roots of V and R: back to the size it has in the other tests
        width = options["V"] * 16 / (8 * 3)
        inputs = inputs.with_tensors(content_up=inputs.tensors["content_up"] / width**0.5)
    return inputs.to(DEVICE)


def run(inputs: OpInputs, backend: str) -> dict[str, Any]:
    return run_with_grads(OPS[inputs.op], inputs, CarveState, output_final_state=True, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "case"), ALL)
def test_values_and_gradients(form: str, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.startswith("segments"):
        monkeypatch.setattr(segments, "SHORTEST", 8)  # so that four fit into a sequence that float64 goes through soon
    inputs = draw(form, DTYPES[dtype], **(GDN2_CASES | CARVE_CASES)[case])
    K, V = inputs.tensors["q"].shape[3], inputs.tensors["v"].shape[3]
    try:
        require_triton_support(inputs.op, DTYPES[dtype], K, V, erase=inputs.options.get("erase", "delta"))
    except NotImplementedError as error:
        with pytest.raises(NotImplementedError, match=re.escape(str(error))):
            run(inputs, "triton")
        return
    check(inputs, dtype)


@ALL_FORMS
def test_a_long_sequence(form: str) -> None:
    check(draw(form, B=1, T=65536, H=1, K=128, V=128), "bf16")


def check(inputs: OpInputs, dtype: str) -> None:
    truth = run(in_float64(inputs), "torch")
    assert_rounded_alike(run(inputs, "triton"), truth, run(inputs, "torch"), dtype)


@ALL_FORMS
def test_gradients_have_no_bias(form: str) -> None:
    """The error along the gradient itself, which averages rounding away and keeps what is systematic."""
    inputs = draw(form, B=2, T=2048, H=2, K=128, V=128)
    truth, found = run(in_float64(inputs), "torch"), run(inputs, "triton")
    for name, expected in truth.items():
        if name.startswith("grad_"):
            expected = expected.double()
            along = ((found[name].double() - expected) * expected).sum() / expected.square().sum()
            assert abs(along.item()) <= 2.0**-9, f"{name}: {along:.1e}"


@ALL_FORMS
@pytest.mark.parametrize(
    ("decay", "future"), [("ordinary", "steep"), ("ordinary", "brisk"), ("brisk", "steep"), ("steep", "brisk")]
)
def test_causal_in_every_bit(form: str, decay: str, future: str) -> None:
    inputs = draw(form, B=1, T=200, H=2, K=128, V=128, decay=decay)
    o = run(inputs, "triton")["o"]
    others = draw(form, B=1, T=200, H=2, K=128, V=128, decay=future, seed=1)
    for t in (1, 17, 63, 64, 100, 150):
        changed = {
            name: torch.cat([x[:, :t], others.tensors[name][:, t:]], 1)
            for name, x in inputs.tensors.items()
            if not name.startswith("content")
        }
        assert torch.equal(run(inputs.with_tensors(**changed), "triton")["o"][:, :t], o[:, :t]), t


@ALL_FORMS
def test_two_runs_are_equal_in_every_bit(form: str) -> None:
    inputs = draw(form, B=2, T=1000, H=4, HV=8, K=128, V=128)
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@ALL_FORMS
def test_no_host_synchronisation(form: str) -> None:
    inputs = draw(form, lengths=[100, 200], H=2, K=128, V=128)
    leaves = inputs.map_floats(lambda x: x.detach().requires_grad_())

    def step() -> None:
        o, _ = leaves.call(OPS[inputs.op], CarveState, backend="triton")
        o.backward(torch.ones_like(o))

    assert_no_host_synchronisation(step)


@pytest.mark.parametrize("form", ["previous", "decayed"])
def test_content_that_is_zero_is_no_content_in_every_bit(form: str) -> None:
    inputs = draw(form, B=1, T=300, H=2, K=128, V=128)
    zero = inputs.with_tensors(content_up=torch.zeros_like(inputs.tensors["content_up"]))
    o = run(zero, "triton")["o"]
    assert torch.equal(run(zero.with_options(content_chunk=128), "triton")["o"], o)
    assert torch.equal(inputs.without_content().call(chunk_carve, backend="triton")[0], o)


def test_delta_form_without_content_is_gdn2() -> None:
    """U = 0: nothing else of the content path changes a bit; GDN-2's own kernels agree within rounding."""
    carve = draw("delta", B=1, T=300, H=2, K=128, V=128)
    carve = carve.with_tensors(content_up=torch.zeros_like(carve.tensors["content_up"]))
    o = run(carve, "triton")["o"]
    assert torch.equal(run(carve.with_options(content_chunk=128), "triton")["o"], o)
    assert torch.equal(run(carve.with_tensors(content_down=-carve.tensors["content_down"]), "triton")["o"], o)
    names = ("q", "k", "v", "g")
    b = torch.sigmoid(carve.tensors["erase_logits"].float() + carve.named["erase_bias"])
    same = OpInputs("gdn2", {n: carve.tensors[n] for n in names} | {"b": b, "w": carve.tensors["w"]}, {}, {})
    assert rms_error(o, run(same, "triton")["o"]) <= FLOORS["bf16"][0]


@ALL_FORMS
def test_no_more_is_saved_than_inputs_and_tiles(form: str) -> None:
    """A and the states, in bfloat16: per chunk and head 64 * 64 + K * V elements; CARVE's vectors besides."""
    inputs = draw(form, B=1, T=4096, H=4, K=128, V=128)
    leaves = inputs.map_floats(lambda x: x.detach().requires_grad_())
    leaves.call(OPS[inputs.op], CarveState, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    o, _ = leaves.call(OPS[inputs.op], CarveState, backend="triton")
    saved = torch.cuda.memory_allocated() - before - o.numel() * 2
    tiles = 4096 // 64 * 4 * (64 * 64 + 128 * 128) * 2
    assert saved <= (1.04 if inputs.op == "carve" else 1.0) * tiles + 2**20

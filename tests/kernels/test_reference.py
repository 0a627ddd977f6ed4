"""The torch ops against the token-by-token float64 recurrence, and the properties every implementation keeps."""

import itertools
from typing import Any

import pytest
import torch
from support.inputs import OpInputs, in_float64, make_inputs, named_outputs, random_loss, run_with_grads
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import assert_close, error
from torch import Tensor

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2, recurrent_carve, recurrent_gdn2

CHUNK = {"gdn2": chunk_gdn2, "carve": chunk_carve}
RECURRENT = {"gdn2": recurrent_gdn2, "carve": recurrent_carve}
ORACLE = {"gdn2": oracle_gdn2, "carve": oracle_carve}
BOTH = pytest.mark.parametrize("op", ["gdn2", "carve"])

# name: (op or both, inputs)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"T{T}": ("both", {"T": T, "K": 6, "V": 10}) for T in (1, 63, 64, 65, 200)},
    "grouped": ("both", {"T": 130, "HV": 4, "K": 9, "V": 5}),
    "three value heads per key head": ("both", {"T": 70, "B": 1, "HV": 6, "initial_state": True}),
    "one channel": ("both", {"T": 70, "K": 1, "V": 1}),
    "packed": ("both", {"lengths": [70, 1, 64, 130], "V": 5}),
    "packed grouped from a state": ("both", {"lengths": [1, 65, 40], "HV": 4, "initial_state": True}),
    "packed with empty sequences": ("both", {"lengths": [0, 65, 0, 3, 0], "initial_state": True}),
    "initial state": ("both", {"T": 100, "K": 7, "V": 4, "initial_state": True}),
    "steep decay": ("both", {"T": 130, "decay": "steep", "initial_state": True}),
    "no decay, extreme erase, zero keys": ("both", {"T": 70, "decay": "none", "erase": "extreme", "zero_keys": True}),
    "wide write gate": ("gdn2", {"T": 70, "short_w": False, "V": 5}),
    "wide write gate, grouped": ("gdn2", {"T": 70, "short_w": False, "HV": 4}),
    "content chunk 128": ("carve", {"T": 300, "content_chunk": 128}),
    "detached": ("carve", {"T": 200, "content_grad": "detached", "initial_state": True}),
    "detached, content chunk 128, grouped": (
        "carve",
        {"T": 150, "content_grad": "detached", "content_chunk": 128, "HV": 4, "counts": [100, 3]},
    ),
    "equal counts": ("carve", {"T": 100, "counts": [17, 17]}),
    "equal counts beyond a WY chunk": ("carve", {"T": 100, "counts": [70, 70], "content_chunk": 128}),
    "unequal counts": ("carve", {"T": 100, "B": 3, "counts": [0, 63, 20]}),
    "unequal counts beyond a WY chunk": ("carve", {"T": 70, "counts": [127, 66], "content_chunk": 192}),
    "counts that end a content chunk": ("carve", {"T": 28, "counts": [36, 35]}),
    "packed with counts": ("carve", {"lengths": [1, 1, 130, 20], "counts": [63, 127, 100, 0], "content_chunk": 128}),
}
CASE_PARAMS = [
    pytest.param(op, options, id=f"{op}: {name}")
    for name, (ops, options) in CASES.items()
    for op in (("gdn2", "carve") if ops == "both" else (ops,))
]


def run(inputs: OpInputs) -> dict[str, Any]:
    return run_with_grads(CHUNK[inputs.op], inputs, CarveState, output_final_state=True)


def forward(ops: dict[str, Any], inputs: OpInputs, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(inputs.op, inputs.call(ops[inputs.op], CarveState, output_final_state=True, **options))


def truth(inputs: OpInputs) -> dict[str, Any]:
    return run_with_grads(ORACLE[inputs.op], in_float64(inputs))


def without_grads(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in results.items() if not name.startswith("grad_")}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize(("op", "options"), CASE_PARAMS)
def test_float64_values_and_gradients(op: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(op, **options)
    assert_close(run(inputs), truth(inputs), "float64")


@pytest.mark.parametrize(("op", "options"), CASE_PARAMS)
def test_recurrent_float64_values(op: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(op, **options)
    assert_close(forward(RECURRENT, inputs), without_grads(truth(inputs)), "float64 recurrent")


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"T": 200, "K": 32, "V": 32, "initial_state": True},
        {"T": 200, "K": 32, "V": 32, "decay": "steep", "erase": "extreme", "zero_keys": True},
        {"T": 200, "K": 32, "V": 16, "decay": "none", "HV": 4},
    ],
    ids=["ordinary", "steep", "no decay"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_dtypes(op: str, options: dict[str, Any], dtype: str) -> None:
    inputs = make_inputs(op, dtype=getattr(torch, dtype), **options)
    results = run(inputs)
    assert results["o"].dtype == inputs.tensors["v"].dtype
    assert results["S"].dtype == torch.float32
    expected = truth(inputs)
    assert_close(results, expected, dtype)
    assert_close(forward(RECURRENT, inputs), without_grads(expected), dtype)


@BOTH
def test_float32_gates_beside_bfloat16_tokens(op: str) -> None:
    inputs = make_inputs(op, T=100, dtype=torch.bfloat16, gate_dtype=torch.float32)
    assert_close(run(inputs), truth(inputs), "bfloat16")


@BOTH
def test_gradient_errors_have_no_bias(op: str) -> None:
    inputs = make_inputs(op, B=4, T=256, K=16, V=16, dtype=torch.float32)
    results, expected = run(inputs), truth(inputs)
    for name in (f"grad_{name}" for name in inputs.tensors):
        difference = results[name].double() - expected[name]
        noise = difference.std() / difference.numel() ** 0.5
        # five standard deviations of the mean of independent errors; one rounding for small tensors
        assert difference.mean().abs() <= 5 * noise + 1e-8 * expected[name].abs().max(), name


@BOTH
def test_scale_and_int64_boundaries(op: str) -> None:
    inputs = make_inputs(op, lengths=[3, 70])
    inputs = inputs.with_options(scale=0.7, cu_seqlens=inputs.options["cu_seqlens"].long())
    assert_close(run(inputs), truth(inputs), "float64")
    assert_close(forward(RECURRENT, inputs), without_grads(truth(inputs)), "float64 recurrent")


def test_one_scalar_gate_is_kimi_delta_attention() -> None:
    """b = w = beta: the state keeps v - S^T k, the delta rule with a decay; a scalar decay makes it Gated DeltaNet."""
    inputs = make_inputs("gdn2", B=1, T=100)
    q, k, v, g, _, beta = inputs.tensors.values()
    for decay in (g, g[..., :1].expand_as(g)):
        S = torch.zeros(2, 8, 8, dtype=torch.float64)
        expected = []
        for t in range(100):
            S = decay[0, t].exp()[..., None] * S
            delta = beta[0, t][:, None] * (v[0, t] - torch.einsum("hkv,hk->hv", S, k[0, t]))
            S = S + torch.einsum("hk,hv->hkv", k[0, t], delta)
            expected.append(torch.einsum("hkv,hk->hv", S, q[0, t]) / 8**0.5)
        o, _ = chunk_gdn2(q, k, v, decay, beta[..., None].expand_as(k), beta)
        assert error(o[0], torch.stack(expected)) < 1e-12


def test_a_full_erase_and_write_replaces_what_a_key_held() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    first_key, second_key = torch.eye(2)
    k = torch.stack([first_key, second_key, first_key])[None, :, None]
    q = torch.stack([first_key, first_key, first_key])[None, :, None]
    ones = torch.ones_like(k)
    o, S = chunk_gdn2(q, k, values[None, :, None], 0 * ones, ones, ones, scale=1.0, output_final_state=True)
    assert torch.equal(o[0, :, 0], torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]]))
    assert S is not None
    assert torch.equal(S[0, 0], torch.tensor([[5.0, 6.0], [3.0, 4.0]]))


def test_erase_scale_widens_the_gate() -> None:
    inputs = make_inputs("carve", T=150, HV=4, initial_state=True).with_options(erase_scale=2.0)
    truth = run_with_grads(oracle_carve, inputs)
    ours = run_with_grads(chunk_carve, inputs, CarveState, output_final_state=True)
    for name, value in truth.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    stepped, _ = inputs.call(recurrent_carve, CarveState)
    whole, _ = inputs.call(chunk_carve, CarveState)
    torch.testing.assert_close(stepped, whole, rtol=1e-10, atol=1e-10)
    narrow, _ = inputs.with_options(erase_scale=1.0).call(chunk_carve, CarveState)
    assert (narrow - whole).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("content_chunk", [64, 128])
@pytest.mark.parametrize("layout", [{"B": 3, "T": 200, "HV": 4}, {"lengths": [130, 1, 69]}, {"T": 5, "K": 7}])
def test_no_content_is_gdn2_bit_for_bit(dtype: torch.dtype, content_chunk: int, layout: dict[str, Any]) -> None:
    inputs = make_inputs("carve", dtype=dtype, content_chunk=content_chunk, initial_state=True, **layout)
    leaves = inputs.with_tensors(content_up=torch.zeros_like(inputs.tensors["content_up"]))
    leaves = leaves.map_floats(lambda x: x.requires_grad_())
    o, state = leaves.call(chunk_carve, CarveState, output_final_state=True)
    (random_loss("gdn2", {"o": o, "S": state.S})).backward()

    q, k, v, g, logits, w = list(inputs.map_floats(lambda x: x.detach().clone().requires_grad_()).tensors.values())[:6]
    S = inputs.state["S"].detach().clone().requires_grad_()
    cu_seqlens = inputs.options.get("cu_seqlens")
    expected = chunk_gdn2(
        q, k, v, g, logits.sigmoid(), w, initial_state=S, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert torch.equal(o, expected[0])
    assert torch.equal(state.S, expected[1])
    random_loss("gdn2", {"o": expected[0], "S": expected[1]}).backward()
    for name, leaf in zip(("q", "k", "v", "g", "erase_logits", "w"), (q, k, v, g, logits, w), strict=True):
        # the sum over the value heads of a group stands before or after the sigmoid's gradient: equal up to rounding
        if name == "erase_logits" and v.shape[2] != q.shape[2]:
            assert error(leaves.tensors[name].grad, leaf.grad) < 8 * torch.finfo(dtype).eps
        else:
            assert torch.equal(leaves.tensors[name].grad, leaf.grad), name
    assert torch.equal(leaves.state["S"].grad, S.grad)

    step = leaves.call(recurrent_carve, CarveState)[0]
    assert torch.equal(step, recurrent_gdn2(q, k, v, g, logits.sigmoid(), w, initial_state=S, cu_seqlens=cu_seqlens)[0])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_later_tokens_change_no_earlier_bit(op: str, dtype: torch.dtype, ops: dict[str, Any]) -> None:
    T = 135
    inputs = make_inputs(op, T=T, K=16, dtype=dtype, initial_state=True)
    before = forward(ops, inputs)["o"]
    others = {
        "as likely": make_inputs(op, T=T, K=16, dtype=dtype, seed=1),
        "steep": make_inputs(op, T=T, K=16, dtype=dtype, decay="steep", erase="extreme", seed=2),
    }
    for t, (kind, other) in itertools.product((0, 14, 15, 16, 31, 40, 62, 63, 64, 100, 127, 133), others.items()):
        changed = {
            name: torch.cat([x[:, : t + 1], (30 if name == "v" else 1) * other.tensors[name][:, t + 1 :]], 1)
            for name, x in inputs.tensors.items()
            if x.ndim >= 3 and not name.startswith("content")
        }
        after = forward(ops, inputs.with_tensors(**changed))["o"]
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), f"{kind} tokens after {t}"
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@BOTH
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_packed_sequences_equal_the_same_alone(op: str, ops: dict[str, Any]) -> None:
    lengths = [1, 70, 64, 130]
    inputs = make_inputs(op, lengths=lengths, counts=[0, 5, 63, 100], content_chunk=128)
    packed = forward(ops, inputs)
    start = 0
    for n, length in enumerate(lengths):
        alone = inputs.tokens(start, start + length).with_options(cu_seqlens=None)
        alone = alone.with_state(CarveState(**{name: x[n : n + 1] for name, x in inputs.state.items()})) \
            if op == "carve" else alone.with_state(inputs.state["S"][n : n + 1])  # fmt: skip
        expected = forward(ops, alone)
        found = {name: x[n : n + 1] for name, x in packed.items() if name != "o"}
        assert_close({"o": packed["o"][:, start : start + length], **found}, expected, "float64 recurrent")
        start += length


SPLITS = [
    [(1, "chunk"), (199, "chunk")],
    [(64, "chunk"), (64, "chunk"), (72, "chunk")],
    [(40, "chunk"), (10, "chunk"), (14, "chunk"), (136, "chunk")],
    [(100, "chunk"), (30, "recurrent"), (70, "chunk")],
    [(63, "recurrent"), (1, "chunk"), (1, "recurrent"), (135, "chunk")],
    [(64, "recurrent"), (136, "recurrent")],
]


@BOTH
@pytest.mark.parametrize("content_chunk", [64, 128])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_into_calls_equals_one_call(op: str, content_chunk: int, split: list[tuple[int, str]]) -> None:
    inputs = make_inputs(op, T=200, HV=4, initial_state=True, content_chunk=content_chunk)
    whole = forward(CHUNK, inputs)
    start = 0
    outputs: list[Tensor] = []
    state: Any = None
    for length, kind in split:
        part = inputs.tokens(start, start + length)
        part = part if state is None else part.with_state(state)
        ops = CHUNK if kind == "chunk" else RECURRENT
        with torch.no_grad():
            o, state = part.call(ops[op], CarveState, output_final_state=True)
        outputs.append(o)
        start += length
    assert_close(named_outputs(op, (torch.cat(outputs, 1), state)), whole, "float64 recurrent")


@BOTH
@pytest.mark.parametrize("content_grad", ["full", "detached"])
def test_gradients_flow_through_the_state_between_calls(op: str, content_grad: str) -> None:
    inputs = make_inputs(op, T=200, initial_state=True, content_grad=content_grad)
    whole = run(inputs)
    leaves = inputs.map_floats(lambda x: x.detach().clone().requires_grad_())
    outputs: list[Tensor] = []
    state: Any = None
    for start, end in ((0, 40), (40, 128), (128, 200)):
        part = leaves.tokens(start, end)
        part = part if state is None else part.with_state(state)
        o, state = part.call(CHUNK[op], CarveState, output_final_state=True)
        outputs.append(o)
    results = named_outputs(op, (torch.cat(outputs, 1), state))
    random_loss(op, results).backward()
    grads: dict[str, Any] = {
        f"grad_{name}": x.grad for name, x in {**leaves.tensors, **leaves.state}.items() if name != "count"
    }
    assert_close({**results, **grads}, whole, "float64 recurrent")


@pytest.mark.parametrize("content_grad", ["full", "detached"])
def test_where_the_gradient_of_the_mean_goes(content_grad: str) -> None:
    """A loss on the second content chunk reaches the values of a finished first one's last query only through m."""
    inputs = make_inputs("carve", T=128, content_grad=content_grad)
    leaves = inputs.map_floats(lambda x: x.requires_grad_())
    o, _ = leaves.call(chunk_carve)
    o[:, 64:].square().sum().backward()
    through_mean = leaves.tensors["q"].grad[:, :64].abs().max()
    assert (through_mean == 0) if content_grad == "detached" else (through_mean > 1e-6)


def test_detached_content_changes_no_output() -> None:
    inputs = make_inputs("carve", T=200)
    assert_same_bits(forward(CHUNK, inputs), forward(CHUNK, inputs, content_grad="detached"))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("erase", [0.0, 1.0, 2.0, "extreme"])
@pytest.mark.parametrize("T", [1, 64, 97])
def test_finite_for_every_finite_input(op: str, dtype: torch.dtype, erase: float | str, T: int) -> None:
    inputs = make_inputs(op, T=T, K=16, dtype=dtype, decay="steep", erase="extreme", zero_keys=True, initial_state=True)
    if erase != "extreme":
        gate = inputs.tensors["b" if op == "gdn2" else "erase_logits"]
        # CARVE's gate stays below 1: there the values become logits that saturate the sigmoid, or sit in its middle
        gate.fill_(float(erase) if op == "gdn2" else 1e4 * (float(erase) - 1))
    for key_value in (None, 0.0):
        if key_value is not None:
            inputs.tensors["k"].fill_(key_value)
        for name, x in run(inputs).items():
            assert x is not None, name
            assert x.isfinite().all(), name


@BOTH
@pytest.mark.parametrize("g", [-1e30, float("-inf")])
def test_total_forgetting_is_exact(op: str, g: float) -> None:
    """A token that forgets everything starts the sequence anew."""
    inputs = make_inputs(op, T=60)
    inputs.tensors["g"][:, 20] = g
    results = run(inputs)
    assert all(x.isfinite().all() for x in results.values())
    anew = forward(CHUNK, inputs.tokens(20, 60))
    assert error(results["o"][:, 20:], anew["o"]) < 1e-12
    assert error(results["S"], anew["S"]) < 1e-12


@BOTH
def test_two_runs_are_bit_identical(op: str) -> None:
    inputs = make_inputs(op, B=3, T=200, HV=4, K=32, V=32, dtype=torch.float32, initial_state=True)
    assert_same_bits(run(inputs), run(inputs))
    assert_same_bits(forward(RECURRENT, inputs), forward(RECURRENT, inputs))


@BOTH
def test_autocast_does_not_reach_inside(op: str) -> None:
    inputs = make_inputs(op, T=70, dtype=torch.float32)
    expected = run(inputs), forward(RECURRENT, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(CHUNK, inputs), forward(RECURRENT, inputs)
    assert_same_bits(found[0], without_grads(expected[0]))
    assert_same_bits(found[1], expected[1])


@BOTH
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_states_are_returned_on_request_and_never_shared(op: str, ops: dict[str, Any]) -> None:
    # no content chunk ends, so the mean passes through
    inputs = make_inputs(op, T=3, initial_state=True, content_chunk=128)
    kept = {name: x.clone() for name, x in inputs.state.items()}
    assert inputs.call(ops[op], CarveState)[1] is None
    final = forward(ops, inputs)
    for x in final.values():
        x.fill_(7)
    assert_same_bits(inputs.state, kept)


@BOTH
def test_recurrent_ops_record_no_gradient(op: str) -> None:
    inputs = make_inputs(op, T=3, initial_state=True).map_floats(lambda x: x.requires_grad_())
    results = named_outputs(op, inputs.call(RECURRENT[op], CarveState, output_final_state=True))
    assert not any(x.requires_grad for x in results.values())


@BOTH
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_raw_decay_and_gate_logits(op: str, ops: dict[str, Any]) -> None:
    inputs = make_inputs(op, T=70, short_w=False)
    A_log, dt_bias = torch.tensor([0.0, 1.0]).double(), torch.tensor([[-1.0], [2.0]]).double().expand(2, 8)
    raw = {name: 2 * torch.randn_like(inputs.tensors[name]) for name in ("g", "b", "w") if name in inputs.tensors}
    formed = {"g": -A_log.exp()[:, None] * torch.nn.functional.softplus(raw["g"] + dt_bias), "w": raw["w"].sigmoid()}
    if op == "gdn2":
        formed["b"] = 1.5 * raw["b"].sigmoid()
    options = {"output_final_state": True} | ({"erase_scale": 1.5} if op == "gdn2" else {})
    decay = {"A_log": A_log, "dt_bias": dt_bias}
    found = inputs.with_tensors(**raw).call(ops[op], CarveState, **decay, gate_logits=True, **options)
    assert_same_bits(named_outputs(op, found), forward(ops, inputs.with_tensors(**formed)))


@BOTH
def test_state_updated_in_place(op: str) -> None:
    inputs = make_inputs(op, T=5, initial_state=True)
    expected = forward(RECURRENT, inputs)
    found = inputs.call(RECURRENT[op], CarveState, inplace_state=True)
    assert_same_bits(named_outputs(op, found), expected)
    assert_same_bits(inputs.state, {name: x for name, x in expected.items() if name != "o"})

"""The torch ops against the token-by-token float64 recurrence, and the properties every implementation keeps."""

import itertools
from typing import Any

import pytest
import torch
from support.inputs import FORMS, OpInputs, in_float64, make_inputs, named_outputs, random_loss, run_with_grads
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import assert_close, assert_same_bits, error
from torch import Tensor

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2, recurrent_carve, recurrent_gdn2

CHUNK = {"gdn2": chunk_gdn2, "carve": chunk_carve}
RECURRENT = {"gdn2": recurrent_gdn2, "carve": recurrent_carve}
ORACLE = {"gdn2": oracle_gdn2, "carve": oracle_carve}
ALL = pytest.mark.parametrize("form", FORMS)
CARVE_FORMS = [form for form in FORMS if form != "gdn2"]

# name: (form, "carve" for all of its forms, or "all"; inputs)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"T{T}": ("all", {"T": T, "K": 6, "V": 10}) for T in (1, 63, 64, 65, 200)},
    "grouped": ("all", {"T": 130, "HV": 4, "K": 9, "V": 5}),
    "three value heads per key head": ("all", {"T": 70, "B": 1, "HV": 6, "initial_state": True}),
    "one channel": ("all", {"T": 70, "K": 1, "V": 1}),
    "packed": ("all", {"lengths": [70, 1, 64, 130], "V": 5}),
    "packed grouped from a state": ("all", {"lengths": [1, 65, 40], "HV": 4, "initial_state": True}),
    "packed with empty sequences": ("all", {"lengths": [0, 65, 0, 3, 0], "initial_state": True}),
    "initial state": ("all", {"T": 100, "K": 7, "V": 4, "initial_state": True}),
    "steep decay": ("all", {"T": 130, "decay": "steep", "initial_state": True}),
    "no decay, extreme erase, zero keys": ("all", {"T": 70, "decay": "none", "erase": "extreme", "zero_keys": True}),
    "wide write gate": ("gdn2", {"T": 70, "short_w": False, "V": 5}),
    "wide write gate, grouped": ("gdn2", {"T": 70, "short_w": False, "HV": 4}),
    "erase gate of one number": ("gdn2", {"T": 70, "short_b": True, "HV": 4}),
    "content chunk 128": ("carve", {"T": 300, "content_chunk": 128}),
    "content of every head": ("carve", {"T": 200, "HV": 4, "content_heads": True, "initial_state": True}),
    "strong erase": ("carve", {"T": 200, "erase": "strong", "HV": 4}),
    "extreme erase": ("carve", {"T": 200, "erase": "extreme", "initial_state": True}),
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
    pytest.param(form, options, id=f"{form}: {name}")
    for name, (forms, options) in CASES.items()
    for form in {"all": list(FORMS), "carve": CARVE_FORMS}.get(forms, [forms])
]


def run(inputs: OpInputs) -> dict[str, Any]:
    return run_with_grads(CHUNK[inputs.op], inputs, CarveState, output_final_state=True)


def forward(ops: dict[str, Any], inputs: OpInputs, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(inputs.call(ops[inputs.op], CarveState, output_final_state=True, **options))


def truth(inputs: OpInputs) -> dict[str, Any]:
    return run_with_grads(ORACLE[inputs.op], in_float64(inputs))


def without_grads(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in results.items() if not name.startswith("grad_")}


@pytest.mark.parametrize(("form", "options"), CASE_PARAMS)
def test_float64_values_and_gradients(form: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(form, **options)
    assert_close(run(inputs), truth(inputs), "float64")


@pytest.mark.parametrize(("form", "options"), CASE_PARAMS)
def test_recurrent_float64_values(form: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(form, **options)
    assert_close(forward(RECURRENT, inputs), without_grads(truth(inputs)), "float64 recurrent")


@ALL
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
def test_narrow_dtypes(form: str, options: dict[str, Any], dtype: str) -> None:
    inputs = make_inputs(form, dtype=getattr(torch, dtype), **options)
    results = run(inputs)
    assert results["o"].dtype == inputs.tensors["v"].dtype
    assert results["S"].dtype == torch.float32
    expected = truth(inputs)
    assert_close(results, expected, dtype)
    assert_close(forward(RECURRENT, inputs), without_grads(expected), dtype)


@ALL
def test_float32_gates_beside_bfloat16_tokens(form: str) -> None:
    inputs = make_inputs(form, T=100, dtype=torch.bfloat16, gate_dtype=torch.float32)
    assert_close(run(inputs), truth(inputs), "bfloat16")


@ALL
def test_gradient_errors_have_no_bias(form: str) -> None:
    inputs = make_inputs(form, B=4, T=256, K=16, V=16, dtype=torch.float32)
    results, expected = run(inputs), truth(inputs)
    for name in (f"grad_{name}" for name in inputs.tensors):
        difference = results[name].double() - expected[name]
        noise = difference.std() / difference.numel() ** 0.5
        # five standard deviations of the mean of independent errors; one rounding for small tensors
        assert difference.mean().abs() <= 5 * noise + 1e-8 * expected[name].abs().max(), name


@ALL
def test_scale_and_int64_boundaries(form: str) -> None:
    inputs = make_inputs(form, lengths=[3, 70])
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
    inputs = make_inputs("delta", T=150, HV=4, initial_state=True).with_options(erase_scale=2.0)
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


LAYOUTS = pytest.mark.parametrize(
    "layout", [{"B": 3, "T": 200, "HV": 4}, {"lengths": [130, 1, 69]}, {"T": 5, "K": 7}], ids=str
)


@pytest.mark.parametrize("form", CARVE_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("content_chunk", [64, 128])
@LAYOUTS
def test_content_that_is_zero_is_no_content_in_every_bit(
    form: str, dtype: torch.dtype, content_chunk: int, layout: dict[str, Any]
) -> None:
    inputs = make_inputs(form, dtype=dtype, content_chunk=content_chunk, initial_state=True, **layout)
    zero = inputs.with_tensors(content_up=torch.zeros_like(inputs.tensors["content_up"]))
    found: list[dict[str, Tensor]] = []
    for same in (zero, inputs.without_content()):
        leaves = same.map_floats(lambda x: x.detach().clone().requires_grad_())
        o, state = leaves.call(chunk_carve, CarveState, output_final_state=True)
        random_loss({"o": o, "S": state.S}).backward()
        named = {**leaves.tensors, **leaves.named, "S": leaves.state["S"]}
        grads = {name: x.grad for name, x in named.items() if not name.startswith("content")}
        found.append({"o": o, "S": state.S, **{f"grad_{name}": x for name, x in grads.items()}})
    assert_same_bits(*found)
    assert not state.mean.any() and not state.partial.any(), "without content no mean is kept"
    steps = (forward(RECURRENT, same)["o"] for same in (zero, inputs.without_content()))
    assert torch.equal(*steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@LAYOUTS
def test_delta_form_without_content_is_gdn2_bit_for_bit(dtype: torch.dtype, layout: dict[str, Any]) -> None:
    inputs = make_inputs("delta", dtype=dtype, initial_state=True, **layout).without_content()
    inputs.named.clear()  # the bias: added before the sigmoid, it would stand in another place
    leaves = inputs.map_floats(lambda x: x.detach().clone().requires_grad_())
    o, state = leaves.call(chunk_carve, CarveState, output_final_state=True)
    random_loss({"o": o, "S": state.S}).backward()

    same = inputs.map_floats(lambda x: x.detach().clone().requires_grad_())
    q, k, v, g, logits, w = list(same.tensors.values())[:6]
    S, cu_seqlens = same.state["S"], inputs.options.get("cu_seqlens")
    expected = chunk_gdn2(
        q, k, v, g, logits.sigmoid(), w, initial_state=S, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert torch.equal(o, expected[0])
    assert torch.equal(state.S, expected[1])
    random_loss({"o": expected[0], "S": expected[1]}).backward()
    for name, leaf in zip(("q", "k", "v", "g", "erase_logits", "w"), (q, k, v, g, logits, w), strict=True):
        # the sum over the value heads of a group stands before or after the sigmoid's gradient: equal up to rounding
        if name == "erase_logits" and v.shape[2] != q.shape[2]:
            assert error(leaves.tensors[name].grad, leaf.grad) < 8 * torch.finfo(dtype).eps
        else:
            assert torch.equal(leaves.tensors[name].grad, leaf.grad), name
    assert torch.equal(leaves.state["S"].grad, S.grad)

    step = leaves.call(recurrent_carve, CarveState)[0]
    assert torch.equal(step, recurrent_gdn2(q, k, v, g, logits.sigmoid(), w, initial_state=S, cu_seqlens=cu_seqlens)[0])


@pytest.mark.parametrize("prediction", ["previous", "decayed"])
def test_diagonal_form_without_content_is_gdn2_with_the_erased_decay(prediction: str) -> None:
    """b = w on all channels ("decayed", KDA), or w exp(-a), which stays in range here ("previous")."""
    inputs = make_inputs(prediction, T=200, HV=4, initial_state=True).without_content()
    q, k, v, g, logits, w = (x for x in inputs.tensors.values() if x is not None)
    a = g + torch.nn.functional.logsigmoid(-(logits + inputs.named["erase_bias"]))
    q, k, a = (x.repeat_interleave(2, 2) for x in (q, k, a))
    b = w[..., None] * ((-a).exp() if prediction == "previous" else torch.ones_like(a))
    expected = chunk_gdn2(q, k, v, a, b, w, initial_state=inputs.state["S"], output_final_state=True)
    found = forward(CHUNK, inputs)
    assert error(found["o"], expected[0]) < 1e-9
    assert error(found["S"], expected[1]) < 1e-9


def test_the_mean_is_of_unscaled_outputs_and_sees_tanh() -> None:
    """One content chunk: m is the mean of S^T q; the next token's gate follows from U tanh(D m)."""
    inputs = make_inputs("decayed", B=1, T=64, H=1)
    first = forward(CHUNK, inputs)
    mean = (first["o"] * 8**0.5).mean(1)
    torch.testing.assert_close(first["mean"], mean, rtol=1e-12, atol=1e-12)
    assert first["count"].tolist() == [0] and not first["partial"].any()
    token = make_inputs("decayed", B=1, T=1, H=1, seed=3)
    D, U = inputs.tensors["content_down"], inputs.tensors["content_up"]
    token = token.with_tensors(content_down=D, content_up=U)
    seen = token.tensors["erase_logits"] + U @ torch.tanh(D @ mean[0, 0])
    state = CarveState(**{name: first[name] for name in ("S", "mean", "partial", "count")})
    expected = forward(CHUNK, token.without_content().with_tensors(erase_logits=seen).with_state(state))
    assert error(forward(CHUNK, token.with_state(state))["o"], expected["o"]) < 1e-12


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_later_tokens_change_no_earlier_bit(form: str, dtype: torch.dtype, ops: dict[str, Any]) -> None:
    T = 135
    inputs = make_inputs(form, T=T, K=16, dtype=dtype, initial_state=True)
    before = forward(ops, inputs)["o"]
    others = {
        "as likely": make_inputs(form, T=T, K=16, dtype=dtype, seed=1),
        "steep": make_inputs(form, T=T, K=16, dtype=dtype, decay="steep", erase="extreme", seed=2),
    }
    for t, (kind, other) in itertools.product((0, 14, 15, 16, 31, 40, 62, 63, 64, 100, 127, 133), others.items()):
        changed = {
            name: torch.cat([x[:, : t + 1], (30 if name == "v" else 1) * other.tensors[name][:, t + 1 :]], 1)
            for name, x in inputs.tensors.items()
            if not name.startswith("content")
        }
        after = forward(ops, inputs.with_tensors(**changed))["o"]
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), f"{kind} tokens after {t}"
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@ALL
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_packed_sequences_equal_the_same_alone(form: str, ops: dict[str, Any]) -> None:
    lengths = [1, 70, 64, 130]
    inputs = make_inputs(form, lengths=lengths, counts=[0, 5, 63, 100], content_chunk=128)
    packed = forward(ops, inputs)
    start = 0
    for n, length in enumerate(lengths):
        alone = inputs.tokens(start, start + length).with_options(cu_seqlens=None)
        alone = alone.with_state(CarveState(**{name: x[n : n + 1] for name, x in inputs.state.items()})) \
            if inputs.op == "carve" else alone.with_state(inputs.state["S"][n : n + 1])  # fmt: skip
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


@ALL
@pytest.mark.parametrize("content_chunk", [64, 128])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_into_calls_equals_one_call(form: str, content_chunk: int, split: list[tuple[int, str]]) -> None:
    inputs = make_inputs(form, T=200, HV=4, initial_state=True, content_chunk=content_chunk)
    whole = forward(CHUNK, inputs)
    start = 0
    outputs: list[Tensor] = []
    state: Any = None
    for length, kind in split:
        part = inputs.tokens(start, start + length)
        part = part if state is None else part.with_state(state)
        ops = CHUNK if kind == "chunk" else RECURRENT
        with torch.no_grad():
            o, state = part.call(ops[inputs.op], CarveState, output_final_state=True)
        outputs.append(o)
        start += length
    assert_close(named_outputs((torch.cat(outputs, 1), state)), whole, "float64 recurrent")


@ALL
@pytest.mark.parametrize("content_grad", ["full", "detached"])
def test_gradients_flow_through_the_state_between_calls(form: str, content_grad: str) -> None:
    inputs = make_inputs(form, T=200, initial_state=True, content_grad=content_grad)
    whole = run(inputs)
    leaves = inputs.map_floats(lambda x: x.detach().clone().requires_grad_())
    outputs: list[Tensor] = []
    state: Any = None
    for start, end in ((0, 40), (40, 128), (128, 200)):
        part = leaves.tokens(start, end)
        part = part if state is None else part.with_state(state)
        o, state = part.call(CHUNK[inputs.op], CarveState, output_final_state=True)
        outputs.append(o)
    results = named_outputs((torch.cat(outputs, 1), state))
    random_loss(results).backward()
    grads: dict[str, Any] = {
        f"grad_{name}": x.grad
        for name, x in {**leaves.tensors, **leaves.named, **leaves.state}.items()
        if name != "count"
    }
    assert_close({**results, **grads}, whole, "float64 recurrent")


@pytest.mark.parametrize("form", CARVE_FORMS)
@pytest.mark.parametrize("content_grad", ["full", "detached"])
def test_where_the_gradient_of_the_mean_goes(form: str, content_grad: str) -> None:
    """A loss on the second content chunk reaches the values of a finished first one's last query only through m."""
    inputs = make_inputs(form, T=128, content_grad=content_grad)
    leaves = inputs.map_floats(lambda x: x.requires_grad_())
    o, _ = leaves.call(chunk_carve)
    o[:, 64:].square().sum().backward()
    through_mean = leaves.tensors["q"].grad[:, :64].abs().max()
    assert (through_mean == 0) if content_grad == "detached" else (through_mean > 1e-6)


@pytest.mark.parametrize("form", CARVE_FORMS)
def test_detached_content_changes_no_output(form: str) -> None:
    inputs = make_inputs(form, T=200)
    assert_same_bits(forward(CHUNK, inputs), forward(CHUNK, inputs, content_grad="detached"))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("erase", [0.0, 1.0, 2.0, "extreme"])
@pytest.mark.parametrize("T", [1, 64, 97])
def test_finite_for_every_finite_input(form: str, dtype: torch.dtype, erase: float | str, T: int) -> None:
    inputs = make_inputs(
        form, T=T, K=16, dtype=dtype, decay="steep", erase="extreme", zero_keys=True, initial_state=True
    )
    if erase != "extreme":
        gate = inputs.tensors["b" if inputs.op == "gdn2" else "erase_logits"]
        # CARVE's gate stays below 1: there the values become logits that saturate the sigmoid, or sit in its middle
        gate.fill_(float(erase) if inputs.op == "gdn2" else 1e4 * (float(erase) - 1))
    for key_value in (None, 0.0):
        if key_value is not None:
            inputs.tensors["k"].fill_(key_value)
        for name, x in run(inputs).items():
            assert x is not None, name
            assert x.isfinite().all(), name


@pytest.mark.parametrize("form", ["gdn2", "decayed", "delta"])
@pytest.mark.parametrize("g", [-1e30, float("-inf")])
def test_total_forgetting_is_exact(form: str, g: float) -> None:
    """A token that forgets everything starts the sequence anew; "previous" still predicts from what was there."""
    inputs = make_inputs(form, T=60)
    inputs.tensors["g"][:, 20] = g
    results = run(inputs)
    assert all(x.isfinite().all() for x in results.values())
    anew = forward(CHUNK, inputs.tokens(20, 60))
    assert error(results["o"][:, 20:], anew["o"]) < 1e-12
    assert error(results["S"], anew["S"]) < 1e-12


@ALL
def test_two_runs_are_bit_identical(form: str) -> None:
    inputs = make_inputs(form, B=3, T=200, HV=4, K=32, V=32, dtype=torch.float32, initial_state=True)
    assert_same_bits(run(inputs), run(inputs))
    assert_same_bits(forward(RECURRENT, inputs), forward(RECURRENT, inputs))


@ALL
def test_autocast_does_not_reach_inside(form: str) -> None:
    inputs = make_inputs(form, T=70, dtype=torch.float32)
    expected = run(inputs), forward(RECURRENT, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(CHUNK, inputs), forward(RECURRENT, inputs)
    assert_same_bits(found[0], without_grads(expected[0]))
    assert_same_bits(found[1], expected[1])


@ALL
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
def test_states_are_returned_on_request_and_never_shared(form: str, ops: dict[str, Any]) -> None:
    # no content chunk ends, so the mean passes through
    inputs = make_inputs(form, T=3, initial_state=True, content_chunk=128)
    kept = {name: x.clone() for name, x in inputs.state.items()}
    assert inputs.call(ops[inputs.op], CarveState)[1] is None
    final = forward(ops, inputs)
    for x in final.values():
        x.fill_(7)
    assert_same_bits(inputs.state, kept)


@ALL
def test_recurrent_ops_record_no_gradient(form: str) -> None:
    inputs = make_inputs(form, T=3, initial_state=True).map_floats(lambda x: x.requires_grad_())
    results = named_outputs(inputs.call(RECURRENT[inputs.op], CarveState, output_final_state=True))
    assert not any(x.requires_grad for x in results.values())


@ALL
@pytest.mark.parametrize("ops", [CHUNK, RECURRENT], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("by_channel", [False, True])
def test_raw_decay_and_gate_logits(form: str, ops: dict[str, Any], by_channel: bool) -> None:
    inputs = make_inputs(form, T=70, short_w=False)
    dt_bias = torch.tensor([[-1.0], [2.0]]).double().expand(2, 8)
    A_log = torch.linspace(0, 1, 16).double().view(2, 8) if by_channel else torch.tensor([0.0, 1.0]).double()
    raw = {name: 2 * torch.randn_like(inputs.tensors[name]) for name in ("g", "b", "w") if name in inputs.tensors}
    rate = A_log.exp() if by_channel else A_log.exp()[:, None]
    formed = {"g": -rate * torch.nn.functional.softplus(raw["g"] + dt_bias), "w": raw["w"].sigmoid()}
    if inputs.op == "gdn2":
        formed["b"] = 1.5 * raw["b"].sigmoid()
    options = {"output_final_state": True} | ({"erase_scale": 1.5} if inputs.op == "gdn2" else {})
    decay = {"A_log": A_log, "dt_bias": dt_bias}
    found = inputs.with_tensors(**raw).call(ops[inputs.op], CarveState, **decay, gate_logits=True, **options)
    assert_same_bits(named_outputs(found), forward(ops, inputs.with_tensors(**formed)))


@ALL
@pytest.mark.parametrize("A_log", [71.0, 89.0, 1e6])
def test_a_rate_beyond_float32_forgets_everything_and_has_no_gradient(form: str, A_log: float) -> None:
    inputs = make_inputs(form, T=70, dtype=torch.float32)
    raw = torch.randn(inputs.tensors["g"].shape).requires_grad_()
    rates, dt_bias = torch.full((2,), A_log, requires_grad=True), torch.zeros(2, 8, requires_grad=True)
    o, _ = inputs.with_tensors(g=raw).call(CHUNK[inputs.op], CarveState, A_log=rates, dt_bias=dt_bias)
    forgets = inputs.with_tensors(g=torch.full_like(raw, -torch.inf).detach())
    assert torch.equal(o, forgets.call(CHUNK[inputs.op], CarveState)[0])
    o.square().sum().backward()
    for x in (raw, rates, dt_bias):
        assert x.grad is not None and (x.grad == 0).all()


@ALL
def test_state_updated_in_place(form: str) -> None:
    inputs = make_inputs(form, T=5, initial_state=True)
    expected = forward(RECURRENT, inputs)
    found = inputs.call(RECURRENT[inputs.op], CarveState, inplace_state=True)
    assert_same_bits(named_outputs(found), expected)
    assert_same_bits(inputs.state, {name: x for name, x in expected.items() if name != "o"})

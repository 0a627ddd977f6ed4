"""The Triton decoding kernels against the float64 recurrence, and the properties a decoder relies on.

Every case runs on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.inputs import FORMS, OpInputs, in_float64, make_inputs, named_outputs
from support.interpreter import DEVICE
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import assert_close, assert_same_bits
from torch import Tensor

from megatron_carve.kernels import CarveState, recurrent_carve, recurrent_gdn2
from megatron_carve.kernels.triton_backend import decode

# sigmoid(-1000) = 1 / (1 + exp(1000)) is an exact 0; the interpreter's numpy remarks on the infinity in between
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

ORACLE = {"gdn2": oracle_gdn2, "carve": oracle_carve}
ALL = pytest.mark.parametrize("form", FORMS)
CARVE_FORMS = [form for form in FORMS if form != "gdn2"]

SMALL = {"B": 1, "H": 1, "K": 32, "V": 32}
# name: (form, "carve" for all of its forms, or "all"; inputs)
# T = 1 takes CARVE's kernel for one token, T > 1 and packed sequences the other.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"K {K}, V {V}, T {T}": ("all", {"T": T, "B": 1, "K": K, "V": V, "initial_state": True})
        for K, V, T in (
            (32, 256, 1), (64, 64, 1), (96, 96, 1), (128, 128, 1), (256, 256, 1), (256, 32, 1),
            (32, 96, 3), (64, 128, 3), (96, 64, 3), (128, 32, 3), (256, 128, 3),
        )
    },
    "no state, one token": ("all", {"T": 1, "K": 32, "V": 32}),
    "no state": ("all", {**SMALL, "T": 70}),
    "grouped, one token": ("all", {"T": 1, "HV": 4, "K": 32, "V": 64, "initial_state": True}),
    "grouped": ("all", {"T": 3, "HV": 6, "K": 32, "V": 32, "initial_state": True}),
    "wide write gate, one token": ("gdn2", {"T": 1, "HV": 4, "K": 32, "V": 64, "short_w": False}),
    "wide write gate": ("gdn2", {"T": 4, "HV": 4, "K": 32, "V": 32, "short_w": False}),
    "packed": ("all", {"lengths": [3, 1, 5], "HV": 4, "K": 32, "V": 32}),
    "packed with empty sequences": ("all", {"lengths": [0, 4, 0, 1, 0], "K": 32, "V": 32, "initial_state": True}),
    "packed, one token": ("all", {"lengths": [0, 1, 0], "K": 32, "V": 32, "initial_state": True}),
    "steep decay, one token": ("all", {"T": 1, "K": 32, "V": 32, "decay": "steep", "initial_state": True}),
    "steep decay": ("all", {**SMALL, "T": 40, "decay": "steep", "initial_state": True}),
    "no decay, extreme erase, zero keys": (
        "all", {**SMALL, "T": 40, "decay": "none", "erase": "extreme", "zero_keys": True}
    ),
    "one token from counts": ("carve", {"T": 1, "B": 3, "K": 32, "V": 32, "counts": [62, 63, 0]}),
    "one token, all counts end": ("carve", {"T": 1, "HV": 4, "K": 32, "V": 32, "counts": [63, 63]}),
    "one token, content chunk 128": ("carve", {"T": 1, "K": 32, "V": 32, "counts": [63, 127], "content_chunk": 128}),
    "across content chunks": ("carve", {**SMALL, "T": 135, "counts": [60]}),
    "to the end of a content chunk": ("carve", {"T": 4, "K": 32, "V": 64, "counts": [60, 61]}),
    "packed across content chunks": ("carve", {
        "lengths": [3, 0, 67, 1], "counts": [62, 63, 63, 63], "H": 1, "K": 32, "V": 32,
    }),
    "erase gate of one number": ("gdn2", {"T": 3, "HV": 4, "K": 32, "V": 32, "short_b": True}),
    "erase gate of one number, one token": ("gdn2", {"T": 1, "HV": 4, "K": 32, "V": 32, "short_b": True}),
    "content of every head, one token": ("carve", {"T": 1, "HV": 4, "K": 32, "V": 32, "content_heads": True,
                                                   "initial_state": True}),
    "content of every head": ("carve", {**SMALL, "HV": 2, "T": 70, "content_heads": True, "initial_state": True}),
    "rank 1": ("carve", {"T": 1, "K": 32, "V": 32, "rank": 1, "initial_state": True}),
    "rank above a block": ("carve", {"T": 1, "K": 32, "V": 32, "rank": 40, "initial_state": True}),
}  # fmt: skip
CASE_PARAMS = [
    pytest.param(form, options, id=f"{form}: {name}")
    for name, (forms, options) in CASES.items()
    for form in {"all": list(FORMS), "carve": CARVE_FORMS}.get(forms, [forms])
]


@pytest.fixture(autouse=True)
def empty_tensors_hold_nan():
    """What a kernel forgets to write shows up as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


DECODE = {
    name: partial(op, backend="triton", output_final_state=True)
    for name, op in (("gdn2", recurrent_gdn2), ("carve", recurrent_carve))
}


def run(inputs: OpInputs, **options: Any) -> dict[str, Tensor]:
    """Results of the kernels by name, on the CPU."""
    results = named_outputs(on_device(inputs).call(DECODE[inputs.op], CarveState, **options))
    return {name: x.cpu() for name, x in results.items()}


def on_device(inputs: OpInputs) -> OpInputs:
    """A copy where the kernels run."""
    inputs = inputs.map_floats(lambda x: x.clone().to(DEVICE))
    inputs = inputs.with_options(**{name: x.to(DEVICE) for name, x in inputs.options.items() if isinstance(x, Tensor)})
    if "count" not in inputs.state:
        return inputs
    return inputs.with_state(CarveState(**{**inputs.state, "count": inputs.state["count"].clone().to(DEVICE)}))


def truth(inputs: OpInputs) -> dict[str, Tensor]:
    return named_outputs(in_float64(inputs).call(ORACLE[inputs.op]))


@pytest.mark.parametrize(("form", "options"), CASE_PARAMS)
def test_float32_values(form: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(form, dtype=torch.float32, **options)
    assert_close(run(inputs), truth(inputs), "float32")


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gate_dtype", [None, torch.float32], ids=["narrow gates", "float32 gates"])
@pytest.mark.parametrize("T", [1, 5])
def test_narrow_dtypes(form: str, dtype: str, gate_dtype: torch.dtype | None, T: int) -> None:
    narrow = getattr(torch, dtype)
    inputs = make_inputs(form, T=T, K=32, V=64, HV=4, dtype=narrow, gate_dtype=gate_dtype, initial_state=True)
    results = run(inputs)
    assert results["o"].dtype == narrow
    assert all(x.dtype == torch.float32 for name, x in results.items() if name not in ("o", "count"))
    expected = truth(inputs)
    assert_close(results, expected, dtype)


@ALL
def test_scale_erase_scale_and_int64_boundaries(form: str) -> None:
    inputs = make_inputs(form, lengths=[2, 3], K=32, V=32, dtype=torch.float32, initial_state=True)
    inputs = inputs.with_options(scale=0.7, cu_seqlens=inputs.options["cu_seqlens"].long())
    if form == "delta":
        inputs = inputs.with_options(erase_scale=2.0)
    assert_close(run(inputs), truth(inputs), "float32")
    one = make_inputs(form, T=1, K=32, V=32, dtype=torch.float32, initial_state=True).with_options(scale=0.7)
    one = one.with_options(erase_scale=2.0) if form == "delta" else one
    assert_close(run(one), truth(one), "float32")


@pytest.mark.parametrize("form", ["gdn2", "decayed", "delta"])
@pytest.mark.parametrize("g", [-1e30, float("-inf")])
@pytest.mark.parametrize("T", [1, 3])
def test_total_forgetting_is_exact(form: str, g: float, T: int) -> None:
    """A first token that forgets everything makes the old S worth nothing, but for what "previous" predicts from it."""
    inputs = make_inputs(form, T=T, K=32, V=32, dtype=torch.float32, initial_state=True)
    inputs.tensors["g"][:, 0] = g
    results = run(inputs)
    parts = {name: 0 * x if name == "S" else x for name, x in inputs.state.items()}
    forgotten = inputs.with_state(parts["S"] if inputs.op == "gdn2" else CarveState(**parts))
    assert_same_bits(results, run(forgotten))


@pytest.mark.parametrize("form", CARVE_FORMS)
@pytest.mark.parametrize("T", [1, 3, pytest.param(70, marks=pytest.mark.slow)])
def test_content_that_is_zero_is_no_content_in_every_bit(form: str, T: int) -> None:
    inputs = make_inputs(form, T=T, K=32, V=64, HV=4, dtype=torch.float32, initial_state=True)
    zero = run(inputs.with_tensors(content_up=torch.zeros_like(inputs.tensors["content_up"])))
    found = run(inputs.without_content())
    assert_same_bits({name: found[name] for name in ("o", "S", "count")}, {n: zero[n] for n in ("o", "S", "count")})
    assert not found["mean"].any() and not found["partial"].any()


@pytest.mark.parametrize("erase", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("T", [1, 3])
def test_delta_form_without_content_is_gdn2_bit_for_bit(erase: float, T: int) -> None:
    """Gates whose sigmoid is exact: the interpreter's and torch's sigmoid differ in the last bit."""
    inputs = make_inputs("delta", T=T, K=32, V=64, HV=4, dtype=torch.float32, initial_state=True).without_content()
    inputs.named.clear()
    logits = inputs.tensors["erase_logits"].sign() * 1000
    logits[..., ::3] = 0
    inputs = inputs.with_tensors(erase_logits=logits).with_options(erase_scale=erase or 1.0)
    results = run(inputs)
    b = (erase or 1.0) * logits.sigmoid()
    q, k, v, g, _, w = list(inputs.tensors.values())[:6]
    same = OpInputs("gdn2", {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}, {"S": inputs.state["S"]}, {})
    assert_same_bits({name: results[name] for name in ("o", "S")}, run(same))


@ALL
@pytest.mark.parametrize(
    "options",
    [
        {"T": 1, "B": 3, "HV": 4, "counts": [63, 62, 5]},
        {"T": 3, "counts": [62, 5]},
        {"lengths": [1, 0, 3, 1], "counts": [63, 63, 62, 0]},
    ],
    ids=["one token", "tokens", "packed"],
)
def test_in_place_equals_out_of_place(form: str, options: dict[str, Any]) -> None:
    # two programs a head, of 32 columns each
    inputs = on_device(make_inputs(form, K=256, V=64, dtype=torch.float32, **options))
    expected = run(inputs)
    kept = {name: x.clone() for name, x in inputs.state.items()}
    o, state = inputs.call(DECODE[inputs.op], CarveState, inplace_state=True, output_final_state=False)
    found = named_outputs((o, state))
    for name, x in inputs.state.items():
        assert found[name].data_ptr() == x.data_ptr()
        assert name == "mean" or not torch.equal(x, kept[name])
    assert_same_bits({name: x.cpu() for name, x in found.items()}, expected)


@ALL
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("content", [True, False])
def test_rows_of_a_longer_state_in_place(form: str, backend: str, content: bool) -> None:
    """Rows that lie apart in memory and in no order, with padding among the sequences."""
    if form == "gdn2" and not content:
        pytest.skip("it has none")
    # of CARVE two programs a head, of 32 columns each
    inputs = on_device(make_inputs(form, B=3, T=1, K=128, V=64, counts=[63, 5, 63], dtype=torch.float32))
    inputs = inputs if content else inputs.without_content()
    rows = torch.tensor([5, -1, 2], device=DEVICE)
    real = rows >= 0
    wanted = named_outputs(inputs.call(DECODE[inputs.op], CarveState, backend=backend))
    wide = torch.full((7, 2 * (128 + 3), 64), 7.0, device=DEVICE)
    found = {"S": wide[:, :256].unflatten(1, (2, 128)), "mean": wide[:, 256:258], "partial": wide[:, 258:260]}
    for name, part in found.items():
        if name in inputs.state:
            part[rows[real]] = inputs.state[name][real]
    before, count = wide.clone(), inputs.state.get("count")
    given = found["S"] if count is None else CarveState(**found, count=count)
    o, _ = inputs.with_state(given).call(
        DECODE[inputs.op], CarveState, inplace_state=True, state_rows=rows, output_final_state=False, backend=backend
    )
    assert torch.equal(o[real], wanted.pop("o")[real])
    assert (o[~real] == 0).all()
    others = torch.ones(7, dtype=torch.bool).index_fill(0, rows[real].cpu(), False)
    assert_same_bits({"others": wide[others]}, {"others": before[others]})
    found["count"] = count
    for name, x in wanted.items():
        if content or name not in ("mean", "partial"):
            assert torch.equal(found[name][real if name == "count" else rows[real]], x[real]), name


@ALL
@pytest.mark.parametrize("options", [{"T": 1}, {"T": 3}, {"lengths": [0, 2]}], ids=["one token", "tokens", "packed"])
def test_the_initial_state_is_left_alone(form: str, options: dict[str, Any]) -> None:
    inputs = on_device(make_inputs(form, K=32, V=32, counts=[63, 63], dtype=torch.float32, **options))
    kept = {name: x.clone() for name, x in inputs.state.items()}
    o, state = inputs.call(DECODE[inputs.op], CarveState, output_final_state=False)
    assert state is None
    final = named_outputs(inputs.call(DECODE[inputs.op], CarveState))
    assert torch.equal(final["o"], o)
    for x in final.values():
        x.fill_(7)
    assert_same_bits(inputs.state, kept)


@ALL
@pytest.mark.parametrize("split", [[1, 69], [4, 1, 65], [3, 67], [69, 1]], ids=str)
def test_any_split_into_calls_equals_one_call(form: str, split: list[int]) -> None:
    inputs = make_inputs(form, **SMALL, T=70, counts=[60], dtype=torch.float32)
    outputs, state, start = [], None, 0
    for length in split:
        part = inputs.tokens(start, start + length)
        part = part if state is None else part.with_state(state)
        results = run(part)
        outputs.append(results.pop("o"))
        state = results["S"] if inputs.op == "gdn2" else CarveState(**results)
        start += length
    found = named_outputs((torch.cat(outputs, 1), state))
    assert_close(found, truth(inputs), "float32")
    assert_close(found, {name: x.double() if name != "count" else x for name, x in run(inputs).items()}, "float32")


@ALL
def test_many_steps_in_place(form: str) -> None:
    inputs = make_inputs(form, B=2, T=12, HV=4, K=32, V=32, counts=[60, 3], dtype=torch.float32)
    running = on_device(inputs)
    steps = [
        running.tokens(t, t + 1).call(DECODE[inputs.op], CarveState, inplace_state=True)[0].cpu() for t in range(12)
    ]  # fmt: skip
    found = {"o": torch.cat(steps, 1), **{name: x.cpu() for name, x in running.state.items()}}
    found = found if inputs.op == "carve" else {name: found[name] for name in ("o", "S")}
    assert_close(found, truth(inputs), "float32")


@ALL
def test_packed_sequences_equal_the_same_alone(form: str) -> None:
    lengths = [1, 5, 0, 3]
    inputs = make_inputs(form, lengths=lengths, counts=[63, 60, 1, 0], K=32, V=32, dtype=torch.float32)
    packed = run(inputs)
    start = 0
    for n, length in enumerate(lengths):
        if length:
            alone = inputs.tokens(start, start + length).with_options(cu_seqlens=None)
            row = {name: x[n : n + 1] for name, x in inputs.state.items()}
            expected = run(alone.with_state(row["S"] if inputs.op == "gdn2" else CarveState(**row)))
            found = {name: x[n : n + 1] for name, x in packed.items() if name != "o"}
            found = {"o": packed["o"][:, start : start + length], **found}
            assert_close(found, {name: x.double() if name != "count" else x for name, x in expected.items()}, "float32")
        start += length


@ALL
@pytest.mark.parametrize("options", [{"T": 1}, {"T": 3}, {"lengths": [2, 1]}], ids=["one token", "tokens", "packed"])
def test_slices_of_a_fused_projection(form: str, options: dict[str, Any]) -> None:
    """Tokens that lie apart are read where they are; other layouts are copied."""
    inputs = make_inputs(form, **options, HV=4, K=32, V=32, dtype=torch.float32, initial_state=True)
    expected = run(inputs)
    token_tensors = [name for name in inputs.tensors if not name.startswith("content")]
    flat = torch.cat([inputs.tensors[name].flatten(2) for name in token_tensors], -1)
    parts = flat.split([inputs.tensors[name][0, 0].numel() for name in token_tensors], -1)
    fused = {name: x.view(inputs.tensors[name].shape) for name, x in zip(token_tensors, parts, strict=True)}
    rows, strides = decode._rows(*fused.values())
    assert strides == [flat.shape[-1]] * len(strides)
    assert all(row.data_ptr() == x.data_ptr() for row, x in zip(rows, fused.values(), strict=True))
    transposed = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in fused.items()}
    for layout in (fused, transposed):
        # not through on_device, which may change the layout
        tensors = {name: x.to(DEVICE) for name, x in {**inputs.tensors, **layout}.items()}
        placed = replace(on_device(inputs), tensors=tensors)
        found = named_outputs(placed.call(DECODE[inputs.op], CarveState))
        assert_same_bits({name: x.cpu() for name, x in found.items()}, expected)


@ALL
def test_boundaries_beyond_the_tokens_are_brought_into_order(form: str) -> None:
    inputs = make_inputs(form, lengths=[2, 0, 2], K=32, V=32, dtype=torch.float32, initial_state=True)
    for ends in ([-5, 2, 1, 4], [0, 2, 2, 100]):
        wrong = inputs.with_options(cu_seqlens=torch.tensor(ends))
        expected = run(inputs)
        found = run(wrong)
        if ends[2] == 1:  # the last sequence then starts at 1
            assert torch.equal(found["S"][:2], expected["S"][:2])
        else:
            assert_same_bits(found, expected)


@ALL
def test_tokens_behind_the_last_sequence_are_zero(form: str) -> None:
    inputs = make_inputs(form, lengths=[2, 3], K=32, V=32, dtype=torch.float32)
    o = run(inputs.with_options(cu_seqlens=torch.tensor([0, 2, 4])))["o"]
    assert (o[:, 4] == 0).all() and (o[:, 3] != 0).any()


@ALL
@pytest.mark.parametrize("T", [1, 3])
def test_two_runs_are_bit_identical(form: str, T: int) -> None:
    inputs = make_inputs(form, B=3, T=T, HV=4, K=64, V=256, dtype=torch.float32, counts=[61, 63, 0])
    assert_same_bits(run(inputs), run(inputs))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("count", [-1, 64, 1000])
def test_a_count_out_of_range_ends_its_content_chunk(T: int, count: int) -> None:
    inputs = make_inputs("previous", T=T, B=1, K=32, V=32, counts=[63], dtype=torch.float32)
    wrong = inputs.with_state(CarveState(**{**inputs.state, "count": torch.tensor([count])}))
    assert_same_bits(run(wrong), run(inputs))


@ALL
def test_no_gradient_is_recorded(form: str) -> None:
    inputs = make_inputs(form, T=1, K=32, V=32, dtype=torch.float32, initial_state=True)
    inputs = on_device(inputs).map_floats(lambda x: x.requires_grad_())
    results = named_outputs(inputs.call(DECODE[inputs.op], CarveState))
    assert not any(x.requires_grad for x in results.values())


@ALL
def test_in_place_needs_a_contiguous_state(form: str) -> None:
    inputs = on_device(make_inputs(form, T=1, K=32, V=32, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"initial_state: .*inplace_state=True, got None"):
        inputs.call(DECODE[inputs.op], CarveState, inplace_state=True)
    inputs = on_device(make_inputs(form, T=1, K=32, V=32, dtype=torch.float32, initial_state=True))
    rows = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="state_rows: expected one token of every sequence and inplace_state=True"):
        inputs.call(DECODE[inputs.op], CarveState, state_rows=rows)
    inputs.state["S"] = inputs.state["S"].mT
    with pytest.raises(ValueError, match=r"initial_state.*contiguous.*strides"):
        inputs.call(DECODE[inputs.op], CarveState, inplace_state=True)
    with pytest.raises(ValueError, match=r"initial_state.*contiguous.*strides"):
        inputs.call(DECODE[inputs.op], CarveState, inplace_state=True, state_rows=rows)

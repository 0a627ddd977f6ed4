"""The Triton chunk ops against the float64 oracle, in Triton's interpreter or on a GPU."""

import math
from typing import Any

import pytest
import torch
from support.inputs import in_float64, make_inputs, run_with_grads
from support.interpreter import DEVICE
from support.oracle import oracle_carve, oracle_gdn2
from support.tolerances import TOLERANCES, assert_close, error

from megatron_carve.kernels import CarveState, chunk_carve, chunk_gdn2

OPS = {"gdn2": chunk_gdn2, "carve": chunk_carve}
ORACLES = {"gdn2": oracle_gdn2, "carve": oracle_carve}
CASES: dict[str, dict[str, Any]] = {
    "one chunk": {"B": 1, "T": 64, "H": 1, "K": 32, "V": 32},
    "grouped heads, odd length": {"B": 1, "T": 75, "H": 1, "HV": 2, "K": 32, "V": 64, "initial_state": True},
    "packed": {"lengths": [1, 70, 0, 3], "H": 1, "K": 32, "V": 32, "initial_state": True},
    "256 values": {"B": 1, "T": 70, "H": 1, "K": 32, "V": 256, "initial_state": True},
    "96 channels": {"B": 1, "T": 70, "H": 1, "K": 96, "V": 32, "initial_state": True},
    "steep": {"B": 1, "T": 80, "H": 1, "K": 32, "V": 32, "decay": "steep", "erase": "extreme", "zero_keys": True},
    "steep beyond half a chunk": {"B": 1, "T": 64, "H": 1, "K": 32, "V": 32, "decay": "brisk", "initial_state": True},
    "chunks of all kinds": {"B": 1, "T": 330, "H": 1, "K": 32, "V": 32, "decay": "by chunk"},
    "steep in ten rows": {"B": 1, "T": 64, "H": 1, "K": 32, "V": 32, "decay": "uneven", "initial_state": True},
}


@pytest.mark.parametrize("op", ["gdn2", "carve"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(op: str, case: str) -> None:
    options = CASES[case] | ({"short_w": False} if op == "gdn2" else {})
    check(op, options)


@pytest.mark.parametrize("step", [-3.49, -6.49])
@pytest.mark.parametrize("op", ["gdn2", "carve"])
def test_rows_turn_steep_where_their_factors_end(op: str, step: float) -> None:
    """Steps whose nearest whole numbers, which float32 sums up apart, add up to far less than they do; of the second,
    those within half a chunk lead beyond the factors' range too."""
    inputs = make_inputs(op, B=1, T=64, H=1, K=32, V=32, dtype=torch.float32)
    tensors = inputs.tensors | {"g": torch.full_like(inputs.tensors["g"], step * math.log(2))}
    found, _ = OPS[op](*(x.to(DEVICE) for x in tensors.values()), backend="triton", **inputs.options)
    expected, _ = OPS[op](*(x.double() for x in tensors.values()), backend="torch", **in_float64(inputs).options)
    assert error(found.cpu(), expected) < TOLERANCES["float32"].o


@pytest.mark.parametrize("decay", ["ordinary", "steep", "brisk"])
@pytest.mark.parametrize("op", ["gdn2", "carve"])
def test_gradients_of_small_losses_are_small_and_else_the_same(op: str, decay: str) -> None:
    """A mean over many tokens gives outputs gradients that factors of decays must not push out of float32's range."""
    inputs = make_inputs(op, B=1, T=70, H=1, K=32, V=32, decay=decay, dtype=torch.float32)

    def gradients(scale: float) -> list[torch.Tensor]:
        leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs.tensors.values()]
        o, _ = OPS[op](*leaves, backend="triton", **inputs.options)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(o)
        return [x / scale for x in torch.autograd.grad(o, leaves, scale * weights)]

    for name, found, expected in zip(inputs.tensors, gradients(2.0**-36), gradients(1.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("decay", ["none", "ordinary", "brisk"])
@pytest.mark.parametrize("op", ["gdn2", "carve"])
def test_outputs_of_small_values_are_small_and_else_as_accurate(op: str, decay: str) -> None:
    inputs = make_inputs(op, B=1, T=140, H=1, K=32, V=32, decay=decay, dtype=torch.float32)
    tensors = inputs.tensors | {"v": inputs.tensors["v"] * 2.0**-36}
    found, _ = OPS[op](*(x.to(DEVICE) for x in tensors.values()), backend="triton", **inputs.options)
    expected, _ = OPS[op](*(x.double() for x in tensors.values()), backend="torch", **in_float64(inputs).options)
    assert error(found.cpu() * 2.0**36, expected * 2.0**36) < TOLERANCES["float32"].o


@pytest.mark.parametrize(
    ("content_grad", "decay"), [("full", "ordinary"), ("full", "by chunk"), ("detached", "ordinary")]
)
def test_carves_content_chunks_across_calls(content_grad: str, decay: str) -> None:
    check("carve", {
        "B": 2, "T": 200, "H": 1, "K": 32, "V": 32, "content_chunk": 128, "counts": [5, 70], "initial_state": True,
        "content_grad": content_grad, "decay": decay,
    })  # fmt: skip


@pytest.mark.parametrize("op", ["gdn2", "carve"])
def test_raw_decay_and_gate_logits(op: str) -> None:
    """Against the torch backend in float64, which forms decay and gates before the recurrence."""
    inputs = make_inputs(op, B=1, T=75, H=2, HV=4, K=32, V=32, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    raw = {"g": 2.0, "b": 1.0, "erase_logits": 1.0, "w": 1.0}  # projections, by their spread
    tensors = {
        name: raw[name] * torch.randn(x.shape, generator=generator, dtype=x.dtype) if name in raw else x
        for name, x in inputs.tensors.items()
    }
    tensors |= {"A_log": torch.tensor([0.0, 1.0]), "dt_bias": torch.randn(2, 32, generator=generator) - 2}

    def run(dtype: torch.dtype, device: str, backend: str) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in tensors.items()}
        given = [x for name, x in leaves.items() if name not in ("A_log", "dt_bias")]
        o, _ = OPS[op](
            *given, A_log=leaves["A_log"], dt_bias=leaves["dt_bias"], gate_logits=True, erase_scale=2.0,
            backend=backend, **inputs.options,
        )  # fmt: skip
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        o.backward(weights.to(o))
        return {"o": o.detach().cpu()} | {
            f"grad_{name}": x.grad.cpu() for name, x in leaves.items() if x.grad is not None
        }

    found, plain, truth = (
        run(dtype, device, backend)
        for dtype, device, backend in (
            (torch.float32, DEVICE, "triton"), (torch.float32, "cpu", "torch"), (torch.float64, "cpu", "torch"),
        )
    )  # fmt: skip
    assert found.keys() == truth.keys() == {"o"} | {f"grad_{name}" for name in tensors}
    for name, expected in truth.items():
        # the sums over all tokens cancel, in the torch backend as in the kernels
        limit = 3 * error(plain[name], expected) + TOLERANCES["float32"].grad
        assert error(found[name], expected) <= limit, name


def check(op: str, options: dict[str, Any]) -> None:
    inputs = make_inputs(op, dtype=torch.float32, **options)
    moved = inputs.to(DEVICE)
    found = run_with_grads(OPS[op], moved, CarveState, output_final_state=True, backend="triton")
    expected = run_with_grads(ORACLES[op], in_float64(inputs))
    if op == "gdn2":
        expected.setdefault("S", None)
    assert_close({name: x.cpu() if x is not None else x for name, x in found.items()}, expected, "float32")


@pytest.mark.parametrize(("K", "dtype"), [(48, torch.float32), (32, torch.float64)])
def test_what_the_kernels_lack_is_refused(K: int, dtype: torch.dtype) -> None:
    inputs = make_inputs("gdn2", T=5, K=K, V=32, dtype=dtype)
    with pytest.raises(NotImplementedError, match="backend 'triton'"):
        inputs.call(chunk_gdn2, backend="triton")

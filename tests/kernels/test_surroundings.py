"""The Triton ops around the recurrence against torch in float64, in Triton's interpreter or on a GPU; their errors."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton.language as tl
from support.dispatch import Copies
from support.interpreter import DEVICE
from support.rounding import assert_rounded_alike
from support.surroundings import Convolution, Heads, Norm
from support.tolerances import TOLERANCES, error

from megatron_carve.kernels.surroundings import (
    convolve_heads,
    convolve_qkv,
    dynamic_convolve_heads,
    dynamic_convolve_qkv,
    gated_head_norm,
)
from megatron_carve.kernels.torch_backend.elementwise import _position_in_sequence
from megatron_carve.kernels.triton_backend import dynamic_convolution
from megatron_carve.kernels.triton_backend.short_convolution import token_age

CASES: dict[str, Convolution | Heads | Norm] = {
    "two batch entries, bias": Convolution(B=2, T=70, H=2, bias=True),
    "one tap": Convolution(B=2, T=5, W=1, bias=True),
    "two taps": Convolution(T=20, W=2),
    "eight taps": Convolution(T=70, W=8, V=40, bias=True),
    "fewer tokens than taps": Convolution(B=2, T=3, W=8, bias=True),
    "one token": Convolution(B=2, T=1),
    "packed": Convolution(lengths=(1, 70, 0, 1, 2, 0, 3, 64, 5), bias=True),
    "packed, eight taps": Convolution(lengths=(0, 1, 5, 1, 1, 3, 70), W=8),
    "one packed sequence": Convolution(lengths=(9,)),
    "96 channels, values that fill no block": Convolution(B=2, T=9, H=2, K=96, V=200),
    "few values": Convolution(T=9, H=1, K=64, V=3),
    "256 channels, several programs": Convolution(T=300, K=256, V=256, extra=0),
    "runs of several programs": Convolution(T=2100, V=3),
    "dynamic": Convolution(B=2, T=40, H=2, R=16, bias=True),
    "dynamic, one tap, one feature": Convolution(B=2, T=5, W=1, R=1),
    "dynamic, eight taps, 32 features": Convolution(T=40, W=8, V=40, R=32, bias=True),
    "dynamic, fewer tokens than taps": Convolution(B=2, T=3, W=8, R=4),
    "dynamic, packed": Convolution(lengths=(1, 70, 0, 1, 2, 0, 3, 64, 5), R=5, bias=True),
    "dynamic, 96 channels, values that fill no block": Convolution(B=2, T=9, H=2, K=96, V=200, R=16),
    "dynamic, several programs": Convolution(T=200, V=3, R=15, extra=0),
    "dynamic, whole tiles": Convolution(T=256, R=16),
    "heads": Heads(B=2, T=20, groups=1, group=4, K=40),
    "heads, packed": Heads(lengths=(1, 70, 0, 2, 5), W=8),
    "dynamic heads": Heads(B=2, T=20, groups=2, group=4, R=16),
    "dynamic heads, packed, 96 channels": Heads(lengths=(1, 33, 0, 1, 2, 5), K=96, R=5),
    "norm": Norm(B=2, T=70, H=3),
    "norm, sigmoid": Norm(B=2, T=9, H=2, activation="sigmoid"),
    "norm, no gate": Norm(B=2, T=70, H=2, V=96, activation="none", x="time first"),
    "norm, 96 channels, sliced heads": Norm(B=2, T=9, H=2, V=96, gate="heads", x="heads"),
    "norm, 256 channels, whole gate": Norm(T=70, H=2, V=256, gate="whole"),
    "norm, several programs": Norm(T=600, H=1),
    "norm, time outside the batch": Norm(B=2, T=70, H=3, x="time first"),
}

SLOW = ("two batch entries, bias", "fewer tokens than taps", "96 channels, values that fill no block", "eight taps")


def cases(names: Iterable[str]) -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("case", cases(CASES))
def test_values_and_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # so that a few tokens take several programs
    monkeypatch.setattr(dynamic_convolution, "LONGEST_RUN", 8)
    monkeypatch.setattr(dynamic_convolution, "SHORTEST_RUN", 8)
    found = CASES[case].run(torch.float32, torch.float32, DEVICE, "triton")
    truth = CASES[case].run(torch.float32, torch.float64, "cpu", "torch")
    compare(found, truth, "float32")


@pytest.mark.parametrize("case", ["dynamic", "dynamic, packed", "dynamic, whole tiles", "dynamic heads"])
def test_dynamic_taps_of_two_tokens_at_a_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with bfloat16, in float32, of which the truth is closer."""
    monkeypatch.setattr(dynamic_convolution, "NARROW", (tl.float32,))
    test_values_and_gradients(case, monkeypatch)


@pytest.mark.parametrize(
    "case", cases(["two batch entries, bias", "packed", "dynamic", "dynamic heads", "norm, sigmoid"])
)
def test_float16_values(case: str) -> None:
    found = CASES[case].run(torch.float16, torch.float16, DEVICE, "triton")
    truth = CASES[case].run(torch.float16, torch.float64, "cpu", "torch")
    assert all(x.dtype == torch.float16 for x in found.values())
    compare(found, truth, "float16")


@pytest.mark.parametrize("case", ["packed", "dynamic", "norm, sigmoid"])
def test_bfloat16_values(case: str) -> None:
    truth, plain, found = (
        CASES[case].run(torch.bfloat16, dtype, device, backend)
        for dtype, device, backend in (
            (torch.float64, "cpu", "torch"), (torch.bfloat16, "cpu", "torch"), (torch.bfloat16, DEVICE, "triton")
        )
    )  # fmt: skip
    assert all(x.dtype == torch.bfloat16 for x in found.values())
    assert_rounded_alike({name: x.cpu() for name, x in found.items()}, truth, plain, "bf16")


@pytest.mark.parametrize("lengths", [None, (1, 9, 0, 2, 3, 5)])
def test_dynamic_taps_are_what_a_loop_over_tokens_finds(lengths: tuple[int, ...] | None) -> None:
    case = Convolution(B=1 if lengths else 2, T=12, H=2, K=3, V=5, R=3, bias=True, lengths=lengths or ())
    found = case.run(torch.float64, torch.float64, "cpu", "torch")
    truth = case.run(torch.float64, torch.float64, "cpu", "oracle")
    compare(found, truth, "float64")


@pytest.mark.parametrize("R", [0, 3])
@pytest.mark.parametrize("lengths", [(), (1, 9, 0, 2, 3, 5)])
def test_heads_are_convolved_as_a_loop_over_tokens_does(lengths: tuple[int, ...], R: int) -> None:
    case = Heads(B=1 if lengths else 2, T=12, groups=2, group=4, K=3, R=R, lengths=lengths)
    found = case.run(torch.float64, torch.float64, "cpu", "torch")
    compare(found, case.run(torch.float64, torch.float64, "cpu", "oracle"), "float64")


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
def test_dynamic_taps_of_no_features_are_static_beside_the_token(backend: str, dtype: torch.dtype) -> None:
    x, weight, features = (torch.randn(shape, dtype=dtype) for shape in ((2, 9, 96), (96, 4), (2, 9, 15)))
    folded = weight + torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype)
    options: dict[str, Any] = {"key_channels": 32, "key_head_dim": 32, "backend": backend}
    moved = [part.to(DEVICE) for part in (x, features, weight, torch.zeros(96, 4, 5, dtype=dtype), folded)]
    found = dynamic_convolve_qkv(*moved[:4], **options)
    for ours, static in zip(found, convolve_qkv(moved[0], moved[4], **options), strict=True):
        torch.testing.assert_close(ours, static)


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: str) -> None:
    assert found.keys() == truth.keys()
    bound = TOLERANCES[tolerance]
    for name, expected in truth.items():
        limit = bound.grad if name.startswith("grad_") else bound.o
        assert error(found[name].cpu(), expected) <= limit, name


def test_weights_stay_float32_beside_16_bit_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 96, generator=generator).half().to(DEVICE).requires_grad_()
    weight, bias = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((96, 4), (96,)))
    weight.requires_grad_()
    found, plain = (
        convolve_qkv(x, weight, bias, key_channels=32, key_head_dim=32, backend=backend)
        for backend in ("triton", "torch")
    )
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == theirs.dtype == torch.float16
        assert error(ours, theirs) <= 2**-10
    dx, d_weight = torch.autograd.grad(found[2].sum(), (x, weight))
    assert (dx.dtype, d_weight.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_age_of_packed_tokens(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 0, 1, 70, 70, 71, 400, 400], dtype=dtype, device=DEVICE)
    assert torch.equal(token_age(ends, 400), _position_in_sequence(ends, 400).int())


@pytest.mark.parametrize("ends", [[-5, 900], [0, 300, 20, 400], [7, 3, 400]])
def test_no_tap_leaves_the_tensor_whatever_the_boundaries(ends: list[int]) -> None:
    tokens = torch.arange(400, device=DEVICE)
    age = token_age(torch.tensor(ends, device=DEVICE), 400)
    assert ((age >= 0) & (age <= tokens)).all()


def test_nothing_but_the_arguments_is_kept_for_the_backward() -> None:
    x = torch.randn(1, 9, 96, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(96, 4, device=DEVICE), torch.randn(96, device=DEVICE)
    ends = torch.tensor([0, 9], device=DEVICE)
    q, _, _ = convolve_qkv(
        x, weight, bias, key_channels=32, key_head_dim=32, cu_seqlens=ends, backend="triton"
    )  # fmt: skip
    assert kept(q) == [t.data_ptr() for t in (x, weight, bias, ends)]
    x, gate = (torch.randn(1, 9, 2, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    out = gated_head_norm(x, gate, weight := torch.randn(32, device=DEVICE), eps=1e-5, activation="silu",
                          backend="triton")  # fmt: skip
    assert kept(out) == [t.data_ptr() for t in (x, gate, weight)]


def test_norm_keeps_the_order_of_its_inputs_in_memory() -> None:
    """So that a layer, whose projections have time outside the batch, copies nothing between the op and them."""
    batch_first, time_first = ((2, 9, 2, 32), (9, 2, 2, 32))
    for x_shape in (batch_first, time_first):
        x, gate, d_out = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (x_shape, time_first, time_first))
        weight = torch.ones(32, device=DEVICE)
        given = x if x_shape == batch_first else x.transpose(0, 1)
        out = gated_head_norm(given, gate.transpose(0, 1), weight, eps=1e-5, activation="silu", backend="triton")
        assert out.shape == batch_first
        assert out.transpose(0, 1).is_contiguous()
        assert kept(out) == [t.data_ptr() for t in (x, gate, weight)]
        seen = []
        for leaf in (x, gate):
            leaf.register_hook(lambda d, seen=seen: seen.append(d.is_contiguous()))
        with Copies() as copies:
            out.backward(d_out.detach().transpose(0, 1))
        assert seen == [True, True]
        assert not copies.made


def test_norm_takes_an_expanded_gradient() -> None:
    x, gate = (torch.randn(2, 9, 2, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=DEVICE)
    found, plain = (
        torch.autograd.grad(gated_head_norm(x, gate, weight, eps=1e-5, activation="silu", backend=b).sum(), (x, gate))
        for b in ("triton", "torch")
    )
    for ours, theirs in zip(found, plain, strict=True):
        assert error(ours, theirs) <= TOLERANCES["float32"].grad


def kept(out: torch.Tensor) -> list[int]:
    return [t.data_ptr() for t in out.grad_fn.saved_tensors]


CONVOLUTION = {"x": torch.randn(2, 5, 96), "weight": torch.randn(96, 4), "key_channels": 32, "key_head_dim": 32}
NORM = {
    "x": torch.randn(2, 5, 3, 32), "gate": torch.randn(2, 5, 3, 32), "weight": torch.randn(32), "eps": 1e-5,
    "activation": "silu",
}  # fmt: skip
X = torch.randn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X(5, 96)}, r"x: expected shape \[B, T, D\], every size at least 1, got \[5, 96\]"),
        ({"x": X(2, 0, 96)}, r"x: expected shape .* got \[2, 0, 96\]"),
        ({"x": X(2, 5, 96).long()}, "x: expected dtype .* got int64"),
        ({"weight": X(4, 96)}, r"weight: expected shape \[D, W\] with D = 96 and W at least 1, got \[4, 96\]"),
        ({"weight": X(96, 4).half()}, "weight: expected dtype float32, got float16"),
        ({"weight": X(96, 4, device="meta")}, r"weight: expected device cpu \(that of x\), got meta"),
        ({"bias": X(95)}, r"bias: expected shape \[D\] = \[96\], got \[95\]"),
        ({"bias": 1.0}, "bias: expected a tensor, got float"),
        ({"key_channels": 48}, "key_channels: expected at least 1 and less than half of D = 96, got 48"),
        ({"key_channels": 0}, "key_channels: expected at least 1 .* got 0"),
        ({"key_head_dim": 20}, "key_head_dim: expected a divisor of key_channels = 32, got 20"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "x: expected B = 1 with cu_seqlens .* got B = 2"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_convolution_refuses_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convolve_qkv(**CONVOLUTION | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": X(96, 4)}, r"up: expected shape \[D, W, R\] with D, W = \[96, 4\] and R at least 1, got \[96, 4\]"),
        ({"up": X(96, 3, 5)}, r"up: expected shape .* got \[96, 3, 5\]"),
        ({"up": X(96, 4, 5).half()}, "up: expected dtype float32, got float16"),
        ({"features": X(2, 5, 14)}, r"features: expected shape \[B, T, 3 R\] = \[2, 5, 15\], got \[2, 5, 14\]"),
        ({"features": X(2, 5, 15).double()}, "features: expected dtype float32, got float64"),
        ({"weight": X(95, 4)}, r"weight: expected shape \[D, W\] with D = 96"),
    ],
)
def test_dynamic_convolution_refuses_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_convolve_qkv(**{**CONVOLUTION, "features": X(2, 5, 15), "up": X(96, 4, 5), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": X(95, 4)}, r"weight: expected shape \[D, W\] with D = 96"),
        ({"features": X(2, 5, 14)}, r"features: expected shape \[B, T, 3 R\] = \[2, 5, 15\], got \[2, 5, 14\]"),
        ({"group": 2}, "group: expected at least 3 heads, of a query, a key and a value, got 2"),
        ({"head_dim": 5}, "head_dim: expected one by whose product with group = 3 D = 96 can be divided, got 5"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "x: expected B = 1 with cu_seqlens .* got B = 2"),
    ],
)
def test_convolution_of_heads_refuses_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    given = {"x": X(2, 5, 96), "features": X(2, 5, 15), "weight": X(96, 4), "up": X(96, 4, 5), "head_dim": 32}
    with pytest.raises(ValueError, match=message):
        dynamic_convolve_heads(**{**given, "group": 3, **changes})
    if changes.keys() & {"weight", "cu_seqlens"}:
        with pytest.raises(ValueError, match=message):
            convolve_heads(**{"x": given["x"], "weight": given["weight"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X(5, 3, 32)}, r"x: expected shape \[B, T, H, V\], every size at least 1, got \[5, 3, 32\]"),
        ({"gate": X(2, 5, 1, 32)}, r"gate: expected shape \[B, T, H, V\] = \[2, 5, 3, 32\], got \[2, 5, 1, 32\]"),
        ({"gate": X(2, 5, 3, 32).double()}, "gate: expected dtype float32, got float64"),
        ({"weight": X(33)}, r"weight: expected shape \[V\] = \[32\], got \[33\]"),
        ({"eps": -1.0}, "eps: expected a number of at least 0, got -1.0"),
        ({"activation": "relu"}, "activation: expected one of silu, sigmoid, none, got 'relu'"),
        ({"activation": "none"}, "activation: expected 'none' without a gate and only then, got 'none' with a gate"),
        ({"gate": None}, "activation: expected 'none' without a gate and only then, got 'silu' with no gate"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_norm_refuses_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_head_norm(**NORM | changes)


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Convolution(T=5), torch.float64, "backend 'triton': no float64"),
        (Convolution(T=5, K=48), torch.float32, "key_head_dim of 32, 64, 96, 128, 256 for convolve_qkv, got 48"),
        (Convolution(T=5, W=9), torch.float32, "expected at most 8 taps in the short convolution, got 9"),
        (Convolution(T=5, R=65), torch.float32, r"at most 64 features \(convolution_rank\) of dynamic taps, 4 of them"),
        (Convolution(T=5, K=96, W=8, R=1), torch.float32, "at most 0 features .* 8 of them for heads of 96"),
        (Heads(T=5), torch.float64, "backend 'triton': no float64"),
        (Heads(T=5, W=9), torch.float32, "expected at most 8 taps in the short convolution, got 9"),
        (Heads(T=5, K=48, R=4), torch.float32, "head_dim of 32, .* for dynamic_convolve_heads, got 48"),
        (Heads(T=5, R=65), torch.float32, r"at most 64 features \(convolution_rank\) of dynamic taps, 4 of them"),
        (Norm(T=5), torch.float64, "backend 'triton': no float64"),
        (Norm(T=5, V=512), torch.float32, "expected V of 32, 64, 96, 128, 256 for gated_head_norm, got 512"),
    ],
)
def test_what_the_kernels_lack_is_refused(case: Convolution | Heads | Norm, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        case.run(dtype, dtype, DEVICE, "triton")
    case.run(dtype, dtype, DEVICE, "torch")

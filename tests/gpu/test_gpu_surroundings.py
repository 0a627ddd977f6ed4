"""The Triton ops around the recurrence on a GPU, at the sizes of real layers.

An error is the largest difference from float64 over the largest value. It may be twice that of the torch backend in the
same dtype (three times for gradients) plus one rounding: of bfloat16, or of the GPU's float32 exp and 1/sqrt.
"""

from typing import Any

import pytest
import torch
from support.gpu import assert_no_host_synchronisation, memory_of_nan
from support.interpreter import DEVICE
from support.surroundings import Convolution, Heads, Norm
from support.tolerances import error

from megatron_carve.kernels.surroundings import (
    convolve_heads,
    convolve_qkv,
    dynamic_convolve_heads,
    dynamic_convolve_qkv,
)

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDING = {"bf16": 2.0**-8, "fp32": 2.0**-22}
CASES: dict[str, Convolution | Heads | Norm] = {
    "convolution": Convolution(B=2, T=1000, H=16, K=128, V=2048, bias=True, extra=2064),
    "convolution, unaligned": Convolution(B=2, T=1000, H=16, K=128, V=2048, extra=3),
    "convolution, packed": Convolution(lengths=(1, 700, 0, 64, 65, 3, 500), H=16, K=128, V=2048, bias=True),
    "convolution, eight taps": Convolution(lengths=(1, 700, 0, 64), H=4, K=96, V=500, W=8, bias=True),
    "convolution, narrow heads": Convolution(B=2, T=3000, H=4, K=32, V=256),
    "convolution, wide heads": Convolution(B=2, T=1000, H=4, K=256, V=1024),
    "dynamic": Convolution(B=2, T=1000, H=16, K=128, V=2048, R=16, bias=True, extra=2064),
    "dynamic, unaligned": Convolution(B=2, T=1000, H=16, K=128, V=2048, R=15, extra=3),
    "dynamic, packed": Convolution(lengths=(1, 700, 0, 64, 65, 3, 500), H=16, K=128, V=2048, R=16, bias=True),
    "dynamic, 96 channels": Convolution(B=2, T=1000, H=4, K=96, V=500, R=4),
    "dynamic, eight taps": Convolution(lengths=(1, 700, 0, 64), H=4, K=64, V=500, W=8, R=16, bias=True),
    "dynamic, narrow heads, 64 features": Convolution(B=2, T=3000, H=4, K=32, V=256, R=64),
    "dynamic, wide heads": Convolution(B=2, T=1000, H=4, K=256, V=1024, W=2, R=16),
    "heads": Heads(B=2, T=1000, groups=16, K=128),
    "heads, packed, grouped queries": Heads(lengths=(1, 700, 0, 64, 65, 3, 500), groups=4, group=6, K=80),
    "dynamic heads": Heads(B=2, T=1000, groups=16, K=128, R=16),
    "dynamic heads, packed, grouped queries": Heads(lengths=(1, 700, 0, 64, 3), groups=4, group=6, K=64, R=16, extra=0),
    "dynamic heads, 96 channels": Heads(B=2, T=1000, groups=2, group=4, K=96, R=5),
    "norm": Norm(B=2, T=1000, H=16, V=128),
    "norm, sigmoid": Norm(B=2, T=1000, H=16, V=128, activation="sigmoid", gate="whole"),
    "norm, 96 channels": Norm(B=2, T=1000, H=16, V=96, gate="heads", x="heads"),
    "norm, wide heads": Norm(B=2, T=1000, H=4, V=256),
}


memory_starts_as_nan = pytest.fixture(autouse=True)(memory_of_nan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: str) -> None:
    kind = DTYPES[dtype]
    truth = CASES[case].run(kind, torch.float64, DEVICE, "torch")
    plain = CASES[case].run(kind, kind, DEVICE, "torch")
    found = CASES[case].run(kind, kind, DEVICE, "triton")
    assert found.keys() == truth.keys()
    failures = []
    for name, expected in truth.items():
        assert found[name].dtype == kind, name
        limit = (3 if name.startswith("grad_") else 2) * error(plain[name], expected) + ROUNDING[dtype]
        found_error = error(found[name], expected)
        if not found_error <= limit:
            failures.append(f"{name}: {found_error:.1e} above {limit:.1e}")
    assert not failures, "; ".join(failures)


@pytest.mark.parametrize(
    "case", ["convolution", "convolution, packed", "dynamic", "dynamic, packed", "heads", "dynamic heads", "norm"]
)
def test_two_runs_are_equal_in_every_bit(case: str) -> None:
    first, second = (CASES[case].run(torch.bfloat16, torch.bfloat16, DEVICE, "triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_auto_is_triton() -> None:
    chosen, named = (CASES["norm"].run(torch.bfloat16, torch.bfloat16, DEVICE, name) for name in ("auto", "triton"))
    assert torch.equal(chosen["out"], named["out"])


def test_no_host_synchronisation() -> None:
    case = CASES["dynamic, packed"]
    D = 2 * case.H * case.K + case.V
    x = torch.randn(1, sum(case.lengths), D, device=DEVICE, requires_grad=True)
    weight = torch.randn(D, case.W, device=DEVICE, requires_grad=True)
    features = torch.randn(1, x.shape[1], 3 * case.R, device=DEVICE, requires_grad=True)
    up = torch.randn(D, case.W, case.R, device=DEVICE, requires_grad=True)
    ends = torch.tensor([0, 1, sum(case.lengths)], device=DEVICE)
    options: dict[str, Any] = {
        "key_channels": case.H * case.K, "key_head_dim": case.K, "cu_seqlens": ends, "backend": "triton",
    }  # fmt: skip

    def step() -> None:
        for op, leaves in ((convolve_qkv, [x, weight]), (dynamic_convolve_qkv, [x, features, weight, up])):
            out = op(*leaves, **options)
            torch.autograd.grad(out, leaves, [torch.ones_like(part) for part in out])
        for op, leaves, sizes in (
            (convolve_heads, [x, weight], {}),
            (dynamic_convolve_heads, [x, features, weight, up], {"head_dim": case.K, "group": D // case.K}),
        ):
            out = op(*leaves, **sizes, cu_seqlens=ends, backend="triton")
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    assert_no_host_synchronisation(step)

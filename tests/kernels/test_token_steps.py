"""Kernels that decode, one token of every sequence, against torch in float64; in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
from support.interpreter import DEVICE
from support.token_steps import TokenSteps
from support.tolerances import assert_close
from torch import Tensor

from megatron_carve.kernels.decoding import add_product, normed_product
from megatron_carve.kernels.token_call import Norm
from megatron_carve.kernels.triton_backend import decode_products

CASES = {
    "previous": TokenSteps("previous", group=2, bias=True),
    "decayed, in slots": TokenSteps("decayed", in_slots=True, rank=0, content=40, activation="sigmoid"),
    "delta": TokenSteps("delta", K=64, content_chunk=2),
    "without content": TokenSteps("previous", content=0, in_slots=True, counted=True, W=1, activation="none"),
    "gdn2": TokenSteps("gdn2", V=64, rank=40),
    "gdn2, in slots, 96 channels": TokenSteps("gdn2", group=2, K=96, V=96, H=1, rank=0, in_slots=True),
    "kda": TokenSteps("kda", group=2, W=2),
}
SLOW = ("delta", "gdn2", "gdn2, in slots, 96 channels")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_mixers_step(case: str) -> None:
    found = CASES[case].run(torch.float32, torch.float32, DEVICE, "triton")
    truth = CASES[case].run(torch.float32, torch.float64, "cpu", "torch")
    assert_close(found, truth, "float32")
    assert not CASES[case].in_slots or not found["o"][1].any()


def products(dtype: torch.dtype, compute: torch.dtype, device: str, backend: str, tokens: int) -> dict[str, Tensor]:
    """Of widths that fill no tile, from rows that lie apart; values of `dtype` held in `compute`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(compute).to(device)

    x, weight, factor, hidden = draw(tokens, 150)[:, :140], draw(22, 140), draw(140), draw(tokens, 22)
    options: dict[str, Any] = {"backend": backend}
    given = hidden.clone()
    named = {
        "normed": normed_product(x, Norm(factor, 1e-5), weight, **options),
        "zero-centred, gated": normed_product(x, Norm(factor, 1e-5, True), weight, gated=True, **options),
        "added": add_product(hidden, x, weight, **options),
    }
    assert torch.equal(hidden, given)
    return {name: out.cpu() for name, out in named.items()}


@pytest.mark.parametrize(
    ("tokens", "block"), [(1, 256), (decode_products.FEW_TOKENS, 64), (decode_products.FEW_TOKENS + 1, 64)]
)
def test_products(tokens: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = decode_products.Tuning(8, block, 4)
    monkeypatch.setattr(decode_products, "PLAIN", tuning)
    monkeypatch.setattr(decode_products, "GATED", tuning)
    monkeypatch.setattr(decode_products, "LONG", decode_products.Tuning(4, 256, 4))
    monkeypatch.setattr(decode_products, "LONG_FROM", 64)
    found = products(torch.float32, torch.float32, DEVICE, "triton", tokens)
    assert_close(found, products(torch.float32, torch.float64, "cpu", "torch", tokens), "float32")

"""chunk_gdn2 with b = w = beta is KDA, with a scalar decay too Gated DeltaNet, and so is chunk_carve without content
and with the decayed prediction, with the erase in its decay: against flash-linear-attention.

Both sides compute in bfloat16, so they may differ by the sum of their errors, each a few roundings of 2^-9.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_carve.kernels import chunk_carve, chunk_gdn2

pytest.importorskip("fla")
pytestmark = pytest.mark.gpu

B, T, H, D = 2, 500, 4, 128
LIMIT = 2.0**-6


def draw() -> list[Tensor]:
    """q, k, v, a log-decay per channel and beta [B, T, H]."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, T, H, D, device="cuda"), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(B, T, H, D, device="cuda").bfloat16()
    g = F.logsigmoid(torch.randn(B, T, H, D, device="cuda"))
    return [q, k, v, g, torch.rand(B, T, H, device="cuda").bfloat16()]


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor | None]:
    g = g if g.ndim == 4 else g[..., None].expand(*k.shape)
    return chunk_gdn2(q, k, v, g, beta, beta, output_final_state=True, backend="triton")


def ours_by_carve(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor | None]:
    """Half of the log-decay as erase, logits being those of sigmoid = 1 - exp(g / 2)."""
    logits = torch.log(torch.expm1(-g / 2))
    o, state = chunk_carve(
        q, k, v, g / 2, logits, beta, None, None, prediction="decayed", output_final_state=True, backend="triton"
    )  # fmt: skip
    assert state is not None
    return o, state.S


def difference(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("op", [ours, ours_by_carve])
def test_kda(op: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    from fla.ops.kda import chunk_kda

    def gradients(run: Callable[..., tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in draw()]
        o, state = run(*leaves)
        assert state is not None
        loss = (o.float() * torch.linspace(-1, 1, D, device="cuda")).sum() + state.square().sum()
        return [o, state, *torch.autograd.grad(loss, leaves)]

    expected = gradients(lambda *x: chunk_kda(*x, output_final_state=True))
    for name, found, peer in zip(("o", "S", "q", "k", "v", "g", "beta"), gradients(op), expected, strict=True):
        assert difference(found, peer) <= LIMIT, name


def test_gated_delta_rule() -> None:
    """Forward only: the peer refuses its own backward on Hopper with some releases of Triton."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    q, k, v, g, beta = draw()
    g = g[..., 0].contiguous()
    expected = fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)
    for name, found, peer in zip(("o", "S"), ours(q, k, v, g, beta), expected, strict=True):
        assert difference(found, peer) <= LIMIT, name

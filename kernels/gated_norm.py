"""RMSNorm of heads, times a weight, times an activated gate, in Triton: one pass over x and gate in each direction.

A tile is one head of some tokens. The backward computes the norm and the activation again; its programs add what their
tokens give to the gradient of the weight, and torch adds up the programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 numbers a thread in each tile, and more threads than channels in all but the widest heads.
TILE_NUMBERS = 4096
NUM_WARPS = 8
# Tiles of a program in the backward, so that its sums are few beside what it reads.
STEPS = 4


class GatedNorm(torch.autograd.Function):
    """x, gate, weight, then eps and the activation -> RMSNorm(x) * weight * activation(gate)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
        B, T, H, V = x.shape
        out = torch.empty_like(x)
        BV, BT = _tile(V)
        with torch.cuda.device_of(x):
            forward_kernel[(H * triton.cdiv(T, BT) * B,)](
                x, gate, weight, out, gate.stride(0), gate.stride(1), T, H, eps,
                V=V, SILU=activation == "silu", BT=BT, BV=BV, num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.eps, ctx.activation = eps, activation
        ctx.save_for_backward(x, gate, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        B, T, H, V = x.shape
        BV, BT = _tile(V)
        programs = H * triton.cdiv(T, BT * STEPS) * B
        dx, d_gate = torch.empty_like(x), gate.new_empty(gate.shape)
        d_weight = x.new_empty(programs, V, dtype=torch.float32)
        with torch.cuda.device_of(x):
            backward_kernel[(programs,)](
                x, gate, weight, d_out.contiguous(), dx, d_gate, d_weight, gate.stride(0), gate.stride(1), T, H,
                ctx.eps, V=V, SILU=ctx.activation == "silu", STEPS=STEPS, BT=BT, BV=BV, num_warps=NUM_WARPS,
            )  # fmt: skip
        return dx, d_gate, d_weight.sum(0).to(weight.dtype), None, None


def _tile(V: int) -> tuple[int, int]:
    """(channels, tokens) of a tile, powers of two."""
    BV = triton.next_power_of_2(V)
    return BV, TILE_NUMBERS // BV


@triton.jit
def forward_kernel(
    x, gate, weight, out, gate_batch, gate_token, T, H, eps,
    V: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program per BT tokens of a batch entry and head; neighbouring programs take neighbouring heads.

    x, out: [B, T, H, V] contiguous; gate the same shape, batch entries gate_batch apart and tokens gate_token, the rest
    contiguous; weight: [V].
    """
    i_h, i_bt = tl.program_id(0) % H, tl.program_id(0) // H
    i_b, i_t = (i_bt // tl.cdiv(T, BT)).to(tl.int64), i_bt % tl.cdiv(T, BT)
    start = (i_b * T * H + i_h) * V
    o_t, o_v = i_t * BT + tl.arange(0, BT), tl.arange(0, BV)
    m_x = (o_t < T)[:, None] & (o_v < V)[None, :]
    o_x = token_offsets(o_t, H * V, o_v)
    b_x = tl.load(x + start + o_x, mask=m_x, other=0.0).to(tl.float32)
    p_gate = gate + i_b * gate_batch + i_h * V + token_offsets(o_t, gate_token, o_v)
    b_gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
    b_weight = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_act, _ = activate(b_gate, SILU)
    b_out = b_x * inverse_rms(b_x, V, eps) * b_weight[None, :] * b_act
    tl.store(out + start + o_x, b_out.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def backward_kernel(
    x, gate, weight, d_out, dx, d_gate, d_weight, gate_batch, gate_token, T, H, eps,
    V: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program per STEPS * BT tokens of a batch entry and head.

    The tensors of the forward; d_out, dx, d_gate: as x; d_weight: [programs, V] float32.
    """
    i_h, i_bt = tl.program_id(0) % H, tl.program_id(0) // H
    token_blocks = tl.cdiv(T, BT * STEPS)
    i_b, i_t = (i_bt // token_blocks).to(tl.int64), i_bt % token_blocks
    start = (i_b * T * H + i_h) * V
    o_v = tl.arange(0, BV)
    b_weight = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_d_weight = tl.zeros([BT, BV], tl.float32)
    for i in range(STEPS):
        o_t = (i_t * STEPS + i) * BT + tl.arange(0, BT)
        m_x = (o_t < T)[:, None] & (o_v < V)[None, :]
        o_x = token_offsets(o_t, H * V, o_v)
        b_x = tl.load(x + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        p_gate = gate + i_b * gate_batch + i_h * V + token_offsets(o_t, gate_token, o_v)
        b_gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
        b_d_out = tl.load(d_out + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_inverse = inverse_rms(b_x, V, eps)
        b_normed = b_x * b_inverse
        b_act, b_slope = activate(b_gate, SILU)
        b_d_gate = b_d_out * b_normed * b_weight * b_slope
        tl.store(d_gate + start + o_x, b_d_gate.to(d_gate.dtype.element_ty), mask=m_x)
        b_d_scaled = b_d_out * b_act
        b_d_weight += b_d_scaled * b_normed
        b_d_normed = b_d_scaled * b_weight
        b_along = tl.sum(b_d_normed * b_normed, 1)[:, None] / V
        b_dx = (b_d_normed - b_normed * b_along) * b_inverse
        tl.store(dx + start + o_x, b_dx.to(dx.dtype.element_ty), mask=m_x)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * V + o_v, tl.sum(b_d_weight, 0), mask=o_v < V)


@triton.jit
def token_offsets(o_t, token_stride, o_v):
    """Where channels o_v of tokens o_t lie from the first token on, [BT, BV] int64."""
    return (o_t.to(tl.int64) * token_stride)[:, None] + o_v[None, :]


@triton.jit
def inverse_rms(b_x, V: tl.constexpr, eps):
    """1 / sqrt(mean of squares + eps) of every row, [BT, 1]; columns beyond V are zero."""
    return tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]


@triton.jit
def activate(b_gate, SILU: tl.constexpr):
    """(activation, its slope) at every gate: SiLU, or sigmoid."""
    b_sigmoid = tl.sigmoid(b_gate)
    if SILU:
        b_silu = b_gate * b_sigmoid
        return b_silu, b_sigmoid + b_silu * (1.0 - b_sigmoid)
    else:  # noqa: RET505  # Triton compiles what follows a return
        return b_sigmoid, b_sigmoid * (1.0 - b_sigmoid)

"""RMSNorm of heads, times a weight, times an activated gate if there is one, in Triton: one pass in each direction.

A tile is one head of some tokens. The backward computes the norm and the activation again; its programs add what their
tokens give to the gradient of the weight, and torch adds up the programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .short_convolution import sigmoid

# 8 numbers a thread in each tile, and more threads than channels in all but the widest heads.
TILE_NUMBERS = 2048
NUM_WARPS = 8
# Tiles of a program in the backward, so that its sums are few beside what it reads.
STEPS = 16


class GatedNorm(torch.autograd.Function):
    """x, gate or None, weight, then eps and the activation -> RMSNorm(x) * weight * activation(gate).

    The heads of every token of x and gate must be one piece of memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str) -> Tensor:
        B, T, H, V = x.shape
        out = _empty_like(x, x if gate is None else gate)
        BV, BT = _tile(V)
        with torch.cuda.device_of(x):
            launch(
                forward_kernel, (H * triton.cdiv(T, BT) * B,),
                x, gate, weight, out, *_strides(x), *_strides(gate), *_strides(out), T, H, eps,
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
        d_out = whole_tokens(d_out)
        dx, d_gate = _empty_like(x, x), None if gate is None else _empty_like(gate, gate)
        d_weight = x.new_empty(programs, V, dtype=torch.float32)
        with torch.cuda.device_of(x):
            launch(
                backward_kernel, (programs,),
                x, gate, weight, d_out, dx, d_gate, d_weight,
                *_strides(x), *_strides(gate), *_strides(d_out), *_strides(dx), *_strides(d_gate), T, H, ctx.eps,
                V=V, SILU=ctx.activation == "silu", STEPS=STEPS, BT=BT, BV=BV, num_warps=NUM_WARPS,
            )  # fmt: skip
        return dx, d_gate, d_weight.sum(0).to(weight.dtype), None, None


def whole_tokens(x: Tensor) -> Tensor:
    """x, [B, T, H, V], copied unless the heads of every token are one piece of memory."""
    _, _, H, V = x.shape
    return x if x.stride(3) == 1 and (H == 1 or x.stride(2) == V) else x.contiguous()


def _empty_like(x: Tensor, order: Tensor) -> Tensor:
    """A dense tensor of the shape and dtype of x; time outside the batch where it is so in `order`."""
    B, T, H, V = x.shape
    if order.stride(0) < order.stride(1):
        return x.new_empty(T, B, H, V).transpose(0, 1)
    return x.new_empty(B, T, H, V)


def _strides(x: Tensor | None) -> tuple[int, int]:
    """From one batch entry, and from one token, to the next."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _tile(V: int) -> tuple[int, int]:
    """(channels, tokens) of a tile, powers of two."""
    BV = triton.next_power_of_2(V)
    return BV, TILE_NUMBERS // BV


@triton.jit
def forward_kernel(
    x, gate, weight, out, x_batch, x_token, gate_batch, gate_token, out_batch, out_token, T, H, eps,
    V: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program per BT tokens of a batch entry and head; neighbouring programs take neighbouring heads.

    x, gate, out: [B, T, H, V], batch entries and tokens as far apart as said, the rest contiguous; weight: [V].
    """
    i_h, i_bt = tl.program_id(0) % H, tl.program_id(0) // H
    i_b, i_t = (i_bt // tl.cdiv(T, BT)).to(tl.int64), i_bt % tl.cdiv(T, BT)
    o_t, o_v = i_t * BT + tl.arange(0, BT), tl.arange(0, BV)
    m_x = (o_t < T)[:, None] & (o_v < V)[None, :]
    b_x = load_head(x, x_batch, x_token, i_b, i_h, o_t, o_v, V, m_x)
    b_weight = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_out = b_x * inverse_rms(b_x, V, eps) * b_weight[None, :]
    if gate is not None:
        b_act, _ = activate(load_head(gate, gate_batch, gate_token, i_b, i_h, o_t, o_v, V, m_x), SILU)
        b_out *= b_act
    store_head(out, out_batch, out_token, i_b, i_h, o_t, o_v, V, m_x, b_out)


@triton.jit
def backward_kernel(
    x, gate, weight, d_out, dx, d_gate, d_weight, x_batch, x_token, gate_batch, gate_token,
    d_out_batch, d_out_token, dx_batch, dx_token, d_gate_batch, d_gate_token, T, H, eps,
    V: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program per STEPS * BT tokens of a batch entry and head.

    The tensors of the forward; d_out, dx, d_gate: like them; d_weight: [programs, V] float32.
    """
    i_h, i_bt = tl.program_id(0) % H, tl.program_id(0) // H
    token_blocks = tl.cdiv(T, BT * STEPS)
    i_b, i_t = (i_bt // token_blocks).to(tl.int64), i_bt % token_blocks
    o_v = tl.arange(0, BV)
    b_weight = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_d_weight = tl.zeros([BT, BV], tl.float32)
    for i in range(STEPS):
        o_t = (i_t * STEPS + i) * BT + tl.arange(0, BT)
        m_x = (o_t < T)[:, None] & (o_v < V)[None, :]
        b_x = load_head(x, x_batch, x_token, i_b, i_h, o_t, o_v, V, m_x)
        b_d_scaled = load_head(d_out, d_out_batch, d_out_token, i_b, i_h, o_t, o_v, V, m_x)
        b_inverse = inverse_rms(b_x, V, eps)
        b_normed = b_x * b_inverse
        if gate is not None:
            b_act, b_slope = activate(load_head(gate, gate_batch, gate_token, i_b, i_h, o_t, o_v, V, m_x), SILU)
            b_d_gate = b_d_scaled * b_normed * b_weight * b_slope
            store_head(d_gate, d_gate_batch, d_gate_token, i_b, i_h, o_t, o_v, V, m_x, b_d_gate)
            b_d_scaled *= b_act
        b_d_weight += b_d_scaled * b_normed
        b_d_normed = b_d_scaled * b_weight
        b_along = tl.sum(b_d_normed * b_normed, 1)[:, None] / V
        b_dx = (b_d_normed - b_normed * b_along) * b_inverse
        store_head(dx, dx_batch, dx_token, i_b, i_h, o_t, o_v, V, m_x, b_dx)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * V + o_v, tl.sum(b_d_weight, 0), mask=o_v < V)


@triton.jit
def head_pointers(x, batch, token, i_b, i_h, o_t, o_v, V: tl.constexpr):
    """Channels o_v of head i_h of tokens o_t of a batch entry, [BT, BV]; `batch` and `token` are strides."""
    return x + i_b * batch + i_h * V + ((o_t.to(tl.int64) * token)[:, None] + o_v[None, :])


@triton.jit
def load_head(x, batch, token, i_b, i_h, o_t, o_v, V: tl.constexpr, m_x):
    p_x = head_pointers(x, batch, token, i_b, i_h, o_t, o_v, V)
    return tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store_head(x, batch, token, i_b, i_h, o_t, o_v, V: tl.constexpr, m_x, b_x):
    p_x = head_pointers(x, batch, token, i_b, i_h, o_t, o_v, V)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def inverse_rms(b_x, V: tl.constexpr, eps):
    """1 / sqrt(mean of squares + eps) of every row, [BT, 1]; columns beyond V are zero."""
    return tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]


@triton.jit
def activate(b_gate, SILU: tl.constexpr):
    """(activation, its slope) at every gate: SiLU, or sigmoid."""
    b_sigmoid = sigmoid(b_gate)
    if SILU:
        b_silu = b_gate * b_sigmoid
        return b_silu, b_sigmoid + b_silu * (1.0 - b_sigmoid)
    else:  # noqa: RET505  # Triton compiles what follows a return
        return b_sigmoid, b_sigmoid * (1.0 - b_sigmoid)

"""Loads and stores of tiles: what a program holds of a tensor, a row for each token of a chunk, or as it lies."""

import triton
import triton.language as tl

from .chunks import BT


@triton.jit
def load_rows(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d):
    """Rows o_r of head i_h of a token tensor [..., H, D] from token `start` on, zero where m_r is false, [rows, BD].

    `start` is a 64-bit scalar; the offsets from there fit 32 bits.
    """
    p_x = x + start * (H * D) + (o_r[:, None] * (H * D) + (i_h * D + o_d)[None, :])
    return tl.load(p_x, mask=m_r[:, None], other=0.0)


@triton.jit
def load_key_and_query(k, q, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, scale):
    """k and scale * q, float32; arguments as those of load_rows."""
    b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    return b_k, load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale


@triton.jit
def store_rows(x, start, o_r, m_r, i_h, H, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_rows."""
    p_x = x + start * (H * D) + (o_r[:, None] * (H * D) + (i_h * D + o_d)[None, :])
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_r[:, None])


@triton.jit
def load_tile(x, i, o_r, D: tl.constexpr, o_d):
    """Rows o_r of tile i of a scratch tensor of [BT, D] tiles."""
    return tl.load(x + i * BT * D + (o_r[:, None] * D + o_d[None, :]))


@triton.jit
def store_tile(x, i, o_r, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_tile."""
    tl.store(x + i * BT * D + (o_r[:, None] * D + o_d[None, :]), b_x.to(x.dtype.element_ty))


@triton.jit
def load_matrix(x, i, o_a, o_b, A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows o_a and columns o_b of matrix i of a tensor of [A, B] matrices, or [B, A] if TRANSPOSED.

    What lies beyond A or B, where a block is wider, is zero.
    """
    if TRANSPOSED:
        p_x = x + i * A * B + (o_a[:, None] + o_b[None, :] * A)
    else:
        p_x = x + i * A * B + (o_a[:, None] * B + o_b[None, :])
    if ((o_a.shape[0] - 1) & A) + ((o_b.shape[0] - 1) & B) == 0:
        return tl.load(p_x)
    return tl.load(p_x, mask=(o_a < A)[:, None] & (o_b < B)[None, :], other=0.0)


@triton.jit
def store_matrix(x, i, o_a, o_b, A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, b_x):
    """The counterpart of load_matrix."""
    if TRANSPOSED:
        p_x = x + i * A * B + (o_a[:, None] + o_b[None, :] * A)
    else:
        p_x = x + i * A * B + (o_a[:, None] * B + o_b[None, :])
    if ((o_a.shape[0] - 1) & A) + ((o_b.shape[0] - 1) & B) == 0:
        tl.store(p_x, b_x.to(x.dtype.element_ty))
    else:
        tl.store(p_x, b_x.to(x.dtype.element_ty), mask=(o_a < A)[:, None] & (o_b < B)[None, :])


@triton.jit
def load_columns(x, i, D: tl.constexpr, o_d):
    """Vector i of a tensor of [D] vectors; columns beyond D, where a block is wider, are zero."""
    if (o_d.shape[0] - 1) & D == 0:  # the block divides D
        return tl.load(x + i * D + o_d)
    return tl.load(x + i * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_columns(x, i, D: tl.constexpr, o_d, b_x):
    """The counterpart of load_columns."""
    tl.store(x + i * D + o_d, b_x.to(x.dtype.element_ty), mask=o_d < D)

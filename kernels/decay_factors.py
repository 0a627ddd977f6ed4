"""Stage 1, forward and backward: the decays of a chunk as factors (see tiles), formed once from the log-decays."""

import triton
import triton.language as tl

from .tiles import LOG2_E, STEEPEST_LOG2_DECAY, chunk_rows, load_rows, store_tile

# The least sum of log2-decays in a block for which its inverse is used: far from float32's and bfloat16's 2^127.
MILD_LOG2_DECAY = tl.constexpr(-100.0)


@triton.jit
def softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    # the logarithm loses a small e beside 1
    small = e * (1.0 - 0.5 * e)
    return tl.where(x > 20.0, x, tl.where(x < -7.0, small, tl.log(1.0 + e)))


@triton.jit
def load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW: tl.constexpr):
    """log2 of the decay per step, [rows, BK] float32, 0 in empty rows; RAW forms it from the raw projection."""
    b_g = load_rows(g, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
    if RAW:
        b_g += tl.load(dt_bias + i_h * K + o_k)[None, :]
        b_g = -tl.exp(tl.load(A_log + i_h)) * softplus(b_g)
        b_g = tl.where(m_r[:, None], b_g, 0.0)
    return tl.maximum(b_g * LOG2_E, STEEPEST_LOG2_DECAY)


@triton.jit
def decay_factors_kernel(
    g, A_log, dt_bias, down, up, rest, blocks, steep, table, H,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr,
):  # fmt: skip
    """One program per block of 16 rows and key head.

    Writes down, up, rest [NC, H, C, K], blocks [NC, H, 4, K] float32, and steep [NC, H, 4] int32: bit r says that the
    decay from the block's start through row r is below 2^MILD_LOG2_DECAY in some channel. Such a row's scores inside
    its block are formed by the kernels of steep.py. Whether a row is steep depends on its past alone.
    """
    i_c, i_b, i_h = tl.program_id(0).to(tl.int64) // 4, tl.program_id(0) % 4, tl.program_id(1)
    i_ch = i_c * H + i_h
    start, low, high = chunk_rows(table, i_c)
    o_16 = tl.arange(0, 16)
    o_r = i_b * 16 + o_16
    m_r = (o_r >= low) & (o_r < high)
    m_next = (o_16 < 15) & (o_r + 1 >= low) & (o_r + 1 < high)
    b_least = tl.zeros([16], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_sum = tl.cumsum(b_g, 0)
        tl.store(blocks + (i_ch * 4 + i_b) * K + o_k, tl.exp2(tl.sum(b_g, 0)))
        b_least = tl.minimum(b_least, tl.min(b_sum, 1))
        store_tile(down, i_ch, o_r, K, o_k, tl.exp2(b_sum))
        store_tile(up, i_ch, o_r, K, o_k, tl.exp2(tl.minimum(-b_sum, -MILD_LOG2_DECAY)))
        # a sum of the steps after the row, not a difference of two sums
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r + 1, m_next, i_h, H, K, o_k, RAW_DECAY)
        store_tile(rest, i_ch, o_r, K, o_k, tl.exp2(tl.cumsum(b_g, 0, reverse=True)))
    bits = tl.sum((b_least < MILD_LOG2_DECAY).to(tl.int32) << o_16, 0)
    tl.store(steep + i_ch * 4 + i_b, bits)

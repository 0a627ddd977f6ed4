"""Stage 1, forward and backward: the decays of a chunk as factors (see tiles), formed once from the log-decays."""

import triton
import triton.language as tl

from .tiles import (
    LOG2_E,
    SHIFT,
    STEEPEST,
    STEEPEST_LOG2_DECAY,
    chunk_rows,
    load_columns,
    load_rows,
    store_tile,
    sum_rows,
)


@triton.jit
def softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    # the logarithm loses a small e beside 1
    small = e * (1.0 - 0.5 * e)
    return tl.where(x > 20.0, x, tl.where(x < -7.0, small, tl.log(1.0 + e)))


@triton.jit
def load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K: tl.constexpr, o_k, RAW: tl.constexpr):
    """log2 of the decay per step, [rows, BK] float32, 0 in empty rows; RAW forms it from the raw projection."""
    b_g = load_rows(g, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
    if RAW:
        b_g += load_columns(dt_bias, i_h, K, o_k)[None, :]
        b_g = -tl.exp(tl.load(A_log + i_h)) * softplus(b_g)
        b_g = tl.where(m_r[:, None], b_g, 0.0)
    return tl.maximum(b_g * LOG2_E, STEEPEST_LOG2_DECAY)


@triton.jit
def shifted_factors(b_g, o_r, CT: tl.constexpr):
    """(sums of b_g from the chunk's start, to the whole number in float32; left; right), [64, BK] each."""
    m_until = o_r[None, :] <= o_r[:, None]
    if tl.bfloat16 == CT:
        b_G = sum_rows(m_until, b_g, CT)
        return b_G, tl.exp2(b_G + SHIFT), tl.exp2(-tl.maximum(b_G, STEEPEST) - SHIFT)
    # a float32 sum near -100 is coarser than the factors; the small parts of the steps, summed apart, are not
    b_whole = tl.floor(b_g + 0.5)
    b_part = sum_rows(m_until, b_g - b_whole, CT)
    b_G = sum_rows(m_until, b_whole, CT)
    b_left = tl.exp2(b_part) * tl.exp2(b_G + SHIFT)
    return b_G, b_left, tl.exp2(-b_part) * tl.exp2(-tl.maximum(b_G, STEEPEST) - SHIFT)


@triton.jit
def decay_factors_kernel(
    g, A_log, dt_bias, left, right, last, rest, steep_from, table, H,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes left, right [NC, H, C, K]; last [NC, H, K] float32, left's last row; steep_from [NC, H] int32; and, only
    for a chunk with steep rows, rest [NC, H, C, K], the decay from after each row to the chunk's end.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_ch = i_c * H + i_h
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    b_least = tl.zeros([64], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_G, b_left, b_right = shifted_factors(b_g, o_r, CT)
        b_least = tl.minimum(b_least, tl.min(b_G, 1))
        store_tile(left, i_ch, o_r, K, o_k, b_left)
        tl.store(last + i_ch * K + o_k, tl.sum(tl.where(o_r[:, None] == 63, b_left, 0.0), 0))
        store_tile(right, i_ch, o_r, K, o_k, b_right)
    first_steep = tl.min(tl.where(b_least < STEEPEST, o_r, 64), 0)
    tl.store(steep_from + i_ch, first_steep)
    if first_steep < 64:
        for i_k in range(K // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
            store_tile(rest, i_ch, o_r, K, o_k, tl.exp2(sum_rows(o_r[None, :] > o_r[:, None], b_g, CT)))

"""Stage 2 of CARVE's forward: everything about a chunk that needs neither its erase gate nor a state."""

import triton
import triton.language as tl

from .chunk_operands import scores
from .decay_factors import load_log2_decay
from .steep import halving_factor
from .tiles import (
    by_block,
    chunk_rows,
    decay_after_block,
    decay_before_block,
    load_blocks,
    load_rows,
    load_steep_rows,
    load_tile,
    pairs_in_block,
    store_tile,
)


@triton.jit
def carve_tiles_kernel(
    q, k, g, A_log, dt_bias, down, up, rest, blocks, steep,
    P, q_sum, P_sum, k_down, k_up, k_16, k_32, k_start, k_to_end, k_halved,
    table, scale, H,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr, WITH_P: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes P [NC, H, C, C], the scores of the scaled queries (WITH_P; it holds steep rows' on entry), and what the sum
    of a chunk's outputs needs: q_sum [NC, H, K] and P_sum [NC, H, C], the column sums of scale * exp(G) q and of P,
    float32. Then keys times decays, [NC, H, C, K]:
        k_down, k_up: for rows and columns of one block of 16,
        k_16, k_32: for pairs of 16 (32) rows: the left factor in the lower ones, the right factor in the upper ones,
        k_start, k_to_end: from the chunk's start, and to its end,
        k_halved [NC, H, 4, C, K]: the factors of the halving steps, only where the chunk has steep rows.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    i_ch = i_c * H + i_h
    b_steep = load_steep_rows(steep, i_ch, o_r)
    m_own = pairs_in_block(o_r, b_steep)
    halving_steps = tl.where(tl.max(b_steep, 0) == 0, 0, 4)
    in_odd = ((o_r // 16) % 2 == 1)[:, None]
    b_P = tl.zeros([64, 64], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
        b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
        b_down = load_tile(down, i_ch, o_r, K, o_k).to(tl.float32)
        b_k_rest = b_k * load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
        b_k_up = (b_k * load_tile(up, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
        b_before = decay_before_block(o_r, b_0, b_1, b_2)
        b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
        if WITH_P:
            b_P += tl.where(o_r[:, None] == o_r[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
            b_P += scores(b_q * b_down, b_k_up, b_k_rest, m_own, o_r, b_1, b_2, CT, PRECISION)
        tl.store(q_sum + i_ch * K + o_k, tl.sum(b_q * b_down * b_before, 0))
        store_tile(k_up, i_ch, o_r, K, o_k, b_k_up)
        store_tile(k_to_end, i_ch, o_r, K, o_k, b_k_rest * decay_after_block(o_r, b_1, b_2, b_3))
        b_k_down = b_k * b_down
        store_tile(k_down, i_ch, o_r, K, o_k, b_k_down)
        store_tile(k_start, i_ch, o_r, K, o_k, b_k_down * b_before)
        store_tile(k_16, i_ch, o_r, K, o_k, tl.where(in_odd, b_k_down, b_k_rest))
        b_k_32 = by_block(o_r, b_k_rest * b_1[None, :], b_k_rest, b_k_down, b_k_down * b_2[None, :])
        store_tile(k_32, i_ch, o_r, K, o_k, b_k_32)
        for step in range(halving_steps):
            b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
            store_tile(k_halved, i_ch * 4 + step, o_r, K, o_k, b_k * halving_factor(b_g, o_r, step, CT))
    if WITH_P:
        m_steep = (b_steep[:, None] == 1) & (o_r[:, None] // 16 == o_r[None, :] // 16) & (o_r[:, None] > o_r[None, :])
        p_P = P + i_ch * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :])
        b_P += tl.load(p_P, mask=m_steep, other=0.0).to(tl.float32)
        tl.store(p_P, b_P.to(P.dtype.element_ty))
    else:
        b_P += load_tile(P, i_ch, o_r, 64, o_r).to(tl.float32)
    tl.store(P_sum + i_ch * 64 + o_r, tl.sum(b_P, 0))

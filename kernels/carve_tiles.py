"""Stage 2 of CARVE's forward: everything about a chunk that needs neither its erase gate nor a state."""

import triton
import triton.language as tl

from .tiles import (
    UNSHIFT,
    chunk_rows,
    load_decay_to_end,
    load_rows,
    load_tile,
    matmul,
    merge_scores,
    store_tile,
)


@triton.jit
def carve_tiles_kernel(
    q, k, left, right, last, rest, steep_from,
    P, q_sum, P_sum, k_left, k_right, k_to_end,
    table, scale, H,
    K: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes P [NC, H, C, C], the scores of the scaled queries (on entry it holds steep rows'), and what the sum of a
    chunk's outputs needs: q_sum [NC, H, K] and P_sum [NC, H, C], the column sums of scale * exp(G) q and of P, float32.
    Then keys times decays, [NC, H, C, K]: left k, right k (shifted, see tiles), and k_to_end.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    i_ch = i_c * H + i_h
    first_steep = tl.load(steep_from + i_ch)
    b_P = tl.zeros([64, 64], tl.float32)
    b_diagonal = tl.zeros([64], tl.float32)  # a row's own score has no decay to be split
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
        b_left = load_tile(left, i_ch, o_r, K, o_k).to(tl.float32)
        b_k_right = (b_k * load_tile(right, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
        store_tile(k_left, i_ch, o_r, K, o_k, b_k * b_left)
        store_tile(k_right, i_ch, o_r, K, o_k, b_k_right)
        b_to_end = load_decay_to_end(right, last, rest, first_steep, i_ch, o_r, K, o_k)
        store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_to_end)
        b_diagonal += tl.sum(b_q * b_k, 1)
        b_q *= b_left
        b_P += matmul(b_q, tl.trans(b_k_right), CT, PRECISION)
        tl.store(q_sum + i_ch * K + o_k, tl.sum(b_q * UNSHIFT, 0))
    o_square = i_ch * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :])
    b_P = merge_scores(b_P, P + o_square, first_steep, o_r)
    b_P = tl.where(o_r[:, None] == o_r[None, :], b_diagonal[:, None], b_P)
    tl.store(P + o_square, b_P.to(P.dtype.element_ty))
    tl.store(P_sum + i_ch * 64 + o_r, tl.sum(b_P, 0))

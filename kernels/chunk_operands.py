"""Stage 2 of GDN-2's forward: what a chunk does to any state, for all chunks at once."""

import triton
import triton.language as tl

from .tiles import (
    by_block,
    chunk_rows,
    decay_after_block,
    decay_before_block,
    load_blocks,
    load_erase_gate,
    load_rows,
    load_steep_rows,
    load_tile,
    load_write_gate,
    matmul,
    pairs_in_block,
    pairs_of_halves,
    store_tile,
    unit_lower_inverse,
)


@triton.jit
def scores(b_left, b_k_up, b_k_rest, m_own, o_r, b_1, b_2, CT: tl.constexpr, PRECISION: tl.constexpr):
    """Decayed scores of rows b_left = x * down against the keys before them, over one block of channels, [64, 64]."""
    b_S = tl.where(m_own, matmul(b_left, tl.trans(b_k_up), CT, PRECISION), 0.0)
    b_S += tl.where(pairs_of_halves(o_r, 4), matmul(b_left, tl.trans(b_k_rest), CT, PRECISION), 0.0)
    # the lower half of the chunk with the upper half: the decay of the blocks in between goes to either side
    b_k_rest *= by_block(o_r, b_1[None, :], 1.0, 0.0, 0.0)
    b_left *= by_block(o_r, 0.0, 0.0, 1.0, b_2[None, :])
    return b_S + matmul(b_left, tl.trans(b_k_rest.to(CT)), CT, PRECISION)


@triton.jit
def chunk_operands_kernel(
    q, k, v, b, w, down, up, rest, blocks, steep,
    A, P, erasure, update, k_to_end,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, SCALAR_W: tl.constexpr, LOGITS_W: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and key head.

    Writes, with C = 64 rows per chunk and G the sum of log-decays from the chunk's start:
        A [NC, H, C, C]: (I + T)^-1, T the scores of the erased keys b k. On entry A and P hold the scores of steep
            rows inside their blocks (see steep.py).
        P [NC, H, C, C]: scores of the scaled queries.
        erasure [NC, H, C, K]: A (exp(G) b k), what the chunk erases of the state.
        update [NC, HV, C, V]: A (w v), what it would write into an empty one.
        k_to_end [NC, H, C, K]: keys decayed to the chunk's end.
    """
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    i_ch = i_c * H + i_h
    b_steep = load_steep_rows(steep, i_ch, o_r)
    m_own = pairs_in_block(o_r, b_steep)

    b_T = tl.zeros([64, 64], tl.float32)
    b_P = tl.zeros([64, 64], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        _, b_1, b_2, _ = load_blocks(blocks, i_ch, K, o_k)
        b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
        b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
        b_P += tl.where(o_r[:, None] == o_r[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        b_down = load_tile(down, i_ch, o_r, K, o_k).to(tl.float32)
        b_k_up = (b_k * load_tile(up, i_ch, o_r, K, o_k).to(tl.float32)).to(CT)
        b_k_rest = b_k * load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32)
        b_P += scores(b_q * b_down, b_k_up, b_k_rest, m_own, o_r, b_1, b_2, CT, PRECISION)
        b_k *= load_erase_gate(b, b, start, o_r, m_r, i_h, H, 0, K, o_k, erase_scale, GATE)
        b_T += scores(b_k * b_down, b_k_up, b_k_rest, m_own, o_r, b_1, b_2, CT, PRECISION)
    o_square = o_r[:, None] * 64 + o_r[None, :]
    m_steep = (b_steep[:, None] == 1) & (o_r[:, None] // 16 == o_r[None, :] // 16) & (o_r[:, None] > o_r[None, :])
    b_P += tl.load(P + i_ch * 64 * 64 + o_square, mask=m_steep, other=0.0).to(tl.float32)
    b_T += tl.load(A + i_ch * 64 * 64 + o_square, mask=m_steep, other=0.0).to(tl.float32)
    tl.store(P + i_ch * 64 * 64 + o_square, b_P.to(P.dtype.element_ty))
    b_A = unit_lower_inverse(b_T, o_r, CT, PRECISION).to(CT)
    tl.store(A + i_ch * 64 * 64 + o_square, b_A)

    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_0, b_1, b_2, b_3 = load_blocks(blocks, i_ch, K, o_k)
        b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
        b_rest = load_tile(rest, i_ch, o_r, K, o_k).to(tl.float32) * decay_after_block(o_r, b_1, b_2, b_3)
        store_tile(k_to_end, i_ch, o_r, K, o_k, b_k * b_rest)
        b_k *= load_erase_gate(b, b, start, o_r, m_r, i_h, H, 0, K, o_k, erase_scale, GATE)
        b_k *= load_tile(down, i_ch, o_r, K, o_k).to(tl.float32) * decay_before_block(o_r, b_0, b_1, b_2)
        store_tile(erasure, i_ch, o_r, K, o_k, matmul(b_A, b_k, CT, PRECISION))
    G = HV // H
    for i_hv in range(i_h * G, i_h * G + G):
        for i_v in range(V // BV):
            o_v = i_v * BV + tl.arange(0, BV)
            b_w = load_write_gate(w, start, o_r, m_r, i_hv, HV, V, o_v, SCALAR_W, LOGITS_W)
            b_z = b_w * load_rows(v, start, o_r, m_r, HV * V, i_hv * V + o_v).to(tl.float32)
            store_tile(update, i_c * HV + i_hv, o_r, V, o_v, matmul(b_A, b_z, CT, PRECISION))

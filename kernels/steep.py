"""Scores inside a block whose decay is too steep to be split at the block's start, and their gradient.

The block is halved again and again instead. At a step, rows of a lower half meet the columns of the upper half before
it, and the decay splits at the upper half's last row: both factors are exponentials of sums of the steps in between
alone, at most 1 for any decay. Programs whose block has no steep row return at once.
"""

import triton
import triton.language as tl

from .decay_factors import load_log2_decay
from .tiles import (
    chunk_rows,
    load_erase_gate,
    load_rows,
    matmul,
    pairs_of_halves,
    pairs_of_halves_mirrored,
    store_rows,
)


@triton.jit
def halving_factor(b_g, o_r, step, CT: tl.constexpr):
    """The factor that each row needs at a step, [rows, BK]: left in a lower half, right in an upper one."""
    half = o_r >> step
    in_lower = (half & 1) == 1
    after = tl.where(in_lower, half << step, o_r + 1)
    until = tl.where(in_lower, o_r + 1, (half + 1) << step)
    between = (o_r[None, :] >= after[:, None]) & (o_r[None, :] < until[:, None])
    if tl.bfloat16 == CT:
        # two halves of a float32's bits, each times 0 or 1
        high = b_g.to(tl.bfloat16)
        low = (b_g - high.to(tl.float32)).to(tl.bfloat16)
        ones = between.to(tl.bfloat16)
        return tl.exp2(tl.dot(ones, low, tl.dot(ones, high)))
    return tl.exp2(tl.dot(between.to(tl.float32), b_g, input_precision="tf32x3"))


@triton.jit
def steep_scores_kernel(
    q, k, g, b, A_log, dt_bias, steep, T, P, table, scale, erase_scale, H,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, RAW_DECAY: tl.constexpr, WITH_T: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of 16 rows and key head: writes the block's own square of T and P [NC, H, C, C]."""
    i_c, i_b, i_h = tl.program_id(0).to(tl.int64) // 4, tl.program_id(0) % 4, tl.program_id(1)
    i_ch = i_c * H + i_h
    if tl.load(steep + i_ch * 4 + i_b) == 0:
        return
    start, low, high = chunk_rows(table, i_c)
    o_16 = tl.arange(0, 16)
    o_r = i_b * 16 + o_16
    m_r = (o_r >= low) & (o_r < high)
    b_T = tl.zeros([16, 16], tl.float32)
    b_P = tl.zeros([16, 16], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
        b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
        if WITH_T:
            b_bk = b_k * load_erase_gate(b, b, start, o_r, m_r, i_h, H, 0, K, o_k, erase_scale, GATE)
        for step in range(4):
            b_e = halving_factor(b_g, o_16, step, CT)
            m_pairs = pairs_of_halves(o_16, step)
            b_columns = tl.trans((b_k * b_e).to(CT))
            b_P += tl.where(m_pairs, matmul(b_q * b_e, b_columns, CT, PRECISION), 0.0)
            if WITH_T:
                b_T += tl.where(m_pairs, matmul(b_bk * b_e, b_columns, CT, PRECISION), 0.0)
    o_square = i_ch * 64 * 64 + o_r[:, None] * 64 + o_r[None, :]
    tl.store(P + o_square, b_P.to(P.dtype.element_ty))
    if WITH_T:
        tl.store(T + o_square, b_T.to(T.dtype.element_ty))


@triton.jit
def steep_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, steep, dT, dP, dq, dk, dbk,
    table, scale, erase_scale, H, HV,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, RAW_DECAY: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of 16 rows, block of key columns and value head.

    Writes [B*T, HV, K] each, through the scores of steep rows inside their block: the gradients dq of scale * q, and
    dk, dbk of k and b k.
    """
    i_c, i_b, i_hv = tl.program_id(0).to(tl.int64) // 4, tl.program_id(0) % 4, tl.program_id(2)
    i_h = i_hv // (HV // H)
    i_chv = i_c * HV + i_hv
    bits = tl.load(steep + (i_c * H + i_h) * 4 + i_b)
    if bits == 0:
        return
    start, low, high = chunk_rows(table, i_c)
    o_16 = tl.arange(0, 16)
    o_r = i_b * 16 + o_16
    m_r = (o_r >= low) & (o_r < high)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
    b_k = load_rows(k, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32)
    b_q = load_rows(q, start, o_r, m_r, H * K, i_h * K + o_k).to(tl.float32) * scale
    b_bk = b_k * load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
    b_dbk = tl.zeros([16, BK], tl.float32)
    b_dq = tl.zeros([16, BK], tl.float32)
    b_dk = tl.zeros([16, BK], tl.float32)
    dT += i_chv * 64 * 64
    dP += i_chv * 64 * 64
    o_pair, o_mirror = o_r[:, None] * 64 + o_r[None, :], o_r[None, :] * 64 + o_r[:, None]
    m_steep = ((bits >> o_16) & 1) == 1
    for step in range(4):
        b_e = halving_factor(b_g, o_16, step, CT)
        b_ke = (b_k * b_e).to(CT)
        m_pairs = pairs_of_halves(o_16, step) & m_steep[:, None]
        b_dbk += b_e * matmul(tl.where(m_pairs, tl.load(dT + o_pair), 0.0), b_ke, CT, PRECISION)
        b_dq += b_e * matmul(tl.where(m_pairs, tl.load(dP + o_pair), 0.0), b_ke, CT, PRECISION)
        m_pairs = pairs_of_halves_mirrored(o_16, step) & m_steep[None, :]
        b_dks = matmul(tl.where(m_pairs, tl.load(dT + o_mirror), 0.0), b_bk * b_e, CT, PRECISION)
        b_dks += matmul(tl.where(m_pairs, tl.load(dP + o_mirror), 0.0), b_q * b_e, CT, PRECISION)
        b_dk += b_e * b_dks
    store_rows(dq, start, o_r, m_r, HV * K, i_hv * K + o_k, b_dq)
    store_rows(dk, start, o_r, m_r, HV * K, i_hv * K + o_k, b_dk)
    store_rows(dbk, start, o_r, m_r, HV * K, i_hv * K + o_k, b_dbk)

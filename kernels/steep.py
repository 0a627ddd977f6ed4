"""Scores of steep rows, those whose decay from the chunk's start is beyond the range of a factor, and their gradient.

The chunk is halved again and again instead. At a step, rows of a lower half meet the columns of the upper half before
it, and the decay splits at the upper half's last row: both factors are exponentials of sums of the steps in between
alone, at most 1 for any decay.
"""

import triton
import triton.language as tl

from .decay_factors import load_log2_decay
from .tiles import (
    GATE_CONTENT,
    chunk_rows,
    load_erase_gate,
    load_rows,
    matmul,
    pairs_of_halves,
    pairs_of_halves_mirrored,
    store_rows,
    sum_rows,
)

HALVINGS = tl.constexpr(6)
# Chunks per program: most have no steep row, and finding that out for one costs less than starting a program.
GROUP = tl.constexpr(8)


@triton.jit
def halving_factor(b_g, o_r, step, CT: tl.constexpr):
    """The factor that each row needs at a step, [64, BK]: left in a lower half, right in an upper one."""
    half = o_r >> step
    in_lower = (half & 1) == 1
    after = tl.where(in_lower, half << step, o_r + 1)
    until = tl.where(in_lower, o_r + 1, (half + 1) << step)
    return tl.exp2(sum_rows((o_r[None, :] >= after[:, None]) & (o_r[None, :] < until[:, None]), b_g, CT))


@triton.jit
def group_is_mild(steep_from, i_h, H, chunks):
    """Whether this program's chunks have no steep row."""
    o_c = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    return tl.min(tl.load(steep_from + o_c * H + i_h, mask=o_c < chunks, other=64), 0) == 64


@triton.jit(noinline=True)
def write_steep_scores(
    q, k, g, b, content, A_log, dt_bias, T, P, table, scale, erase_scale, i_c, i_h, i_scores, H,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, RAW_DECAY: tl.constexpr,
    WITH_T: tl.constexpr, WITH_P: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write tile i_scores of T and P, of which the steep rows count; content too is that of i_scores.

    Not inlined: it shall take no registers from a loop that rarely needs it.
    """
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    b_T = tl.zeros([64, 64], tl.float32)
    b_P = tl.zeros([64, 64], tl.float32)
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        if WITH_P:
            b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
            b_P += tl.where(o_r[:, None] == o_r[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        if WITH_T:
            b_bk = b_k * load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_scores, K, o_k, erase_scale, GATE)
        for step in range(HALVINGS):
            b_e = halving_factor(b_g, o_r, step, CT)
            m_pairs = pairs_of_halves(o_r, step)
            b_columns = tl.trans((b_k * b_e).to(CT))
            if WITH_P:
                b_P += tl.where(m_pairs, matmul(b_q * b_e, b_columns, CT, PRECISION), 0.0)
            if WITH_T:
                b_T += tl.where(m_pairs, matmul(b_bk * b_e, b_columns, CT, PRECISION), 0.0)
    o_square = i_scores * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :])
    if WITH_P:
        tl.store(P + o_square, b_P.to(P.dtype.element_ty))
    if WITH_T:
        tl.store(T + o_square, b_T.to(T.dtype.element_ty))


@triton.jit
def steep_scores_kernel(
    q, k, g, b, A_log, dt_bias, steep_from, T, P, table, scale, erase_scale, chunks, H,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, RAW_DECAY: tl.constexpr, WITH_T: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks and key head: writes T and P [NC, H, C, C], of which the steep rows count."""
    i_h = tl.program_id(1)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    for i in range(GROUP):
        i_c = tl.program_id(0).to(tl.int64) * GROUP + i
        if tl.load(steep_from + i_c * H + i_h, mask=i_c < chunks, other=64) < 64:
            write_steep_scores(
                q, k, g, b, b, A_log, dt_bias, T, P, table, scale, erase_scale, i_c, i_h, i_c * H + i_h, H,
                K, BK, GATE, RAW_DECAY, WITH_T, True, CT, PRECISION,
            )  # fmt: skip


@triton.jit(noinline=True)
def write_steep_erase_gradient(
    k, g, erase_logits, content, A_log, dt_bias, dT, d_content, table, erase_scale, i_c, i_h, i_content, i_scores, H,
    first_steep,
    K: tl.constexpr, BK: tl.constexpr, RAW_DECAY: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From tile i_scores of dT, write vector i_scores of d_content: the gradient of content through steep rows' T."""
    start, low, high = chunk_rows(table, i_c)
    o_r = tl.arange(0, 64)
    m_r = (o_r >= low) & (o_r < high)
    b_dT = tl.load(dT + i_scores * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :]))
    for i_k in range(K // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
        b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
        b_b = load_erase_gate(
            erase_logits, content, start, o_r, m_r, i_h, H, i_content, K, o_k, erase_scale, GATE_CONTENT
        )
        b_slope = b_k * b_b * (1.0 - b_b / erase_scale)
        b_db = tl.zeros([64, BK], tl.float32)
        for step in range(HALVINGS):
            b_e = halving_factor(b_g, o_r, step, CT)
            m_pairs = pairs_of_halves(o_r, step) & (o_r >= first_steep)[:, None]
            b_db += b_slope * b_e * matmul(tl.where(m_pairs, b_dT, 0.0), b_k * b_e, CT, PRECISION)
        tl.store(d_content + i_scores * K + o_k, tl.sum(b_db, 0))


@triton.jit
def steep_gradient_kernel(
    q, k, g, b, A_log, dt_bias, content, steep_from, dT, dP, dq, dk, dbk,
    table, scale, erase_scale, chunks, H, HV,
    K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, RAW_DECAY: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of chunks and value head.

    Writes [B*T, HV, K] each, through the scores of steep rows: the gradients dq of scale * q, and dk, dbk of k and b k.
    """
    i_hv = tl.program_id(1)
    i_h = i_hv // (HV // H)
    if group_is_mild(steep_from, i_h, H, chunks):
        return
    o_r = tl.arange(0, 64)
    for i in range(GROUP):
        i_c = tl.program_id(0).to(tl.int64) * GROUP + i
        first_steep = tl.load(steep_from + i_c * H + i_h, mask=i_c < chunks, other=64)
        if first_steep < 64:
            i_chv = i_c * HV + i_hv
            start, low, high = chunk_rows(table, i_c)
            m_r = (o_r >= low) & (o_r < high)
            o_square = i_chv * 64 * 64 + (o_r[:, None] * 64 + o_r[None, :])
            b_dT, b_dP = tl.load(dT + o_square), tl.load(dP + o_square)
            for i_k in range(K // BK):
                o_k = i_k * BK + tl.arange(0, BK)
                b_g = load_log2_decay(g, A_log, dt_bias, start, o_r, m_r, i_h, H, K, o_k, RAW_DECAY)
                b_k = load_rows(k, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32)
                b_q = load_rows(q, start, o_r, m_r, i_h, H, K, o_k).to(tl.float32) * scale
                b_bk = b_k * load_erase_gate(b, content, start, o_r, m_r, i_h, H, i_chv, K, o_k, erase_scale, GATE)
                b_dbk = tl.zeros([64, BK], tl.float32)
                b_dq = tl.zeros([64, BK], tl.float32)
                b_dk = tl.zeros([64, BK], tl.float32)
                for step in range(HALVINGS):
                    b_e = halving_factor(b_g, o_r, step, CT)
                    b_ke = (b_k * b_e).to(CT)
                    m_pairs = pairs_of_halves(o_r, step) & (o_r >= first_steep)[:, None]
                    b_dbk += b_e * matmul(tl.where(m_pairs, b_dT, 0.0), b_ke, CT, PRECISION)
                    b_dq += b_e * matmul(tl.where(m_pairs, b_dP, 0.0), b_ke, CT, PRECISION)
                    m_pairs = pairs_of_halves_mirrored(o_r, step) & (o_r >= first_steep)[None, :]
                    b_dks = matmul(tl.where(m_pairs, tl.trans(b_dT), 0.0), b_bk * b_e, CT, PRECISION)
                    b_dks += matmul(tl.where(m_pairs, tl.trans(b_dP), 0.0), b_q * b_e, CT, PRECISION)
                    b_dk += b_e * b_dks
                store_rows(dq, start, o_r, m_r, i_hv, HV, K, o_k, b_dq)
                store_rows(dk, start, o_r, m_r, i_hv, HV, K, o_k, b_dk)
                store_rows(dbk, start, o_r, m_r, i_hv, HV, K, o_k, b_dbk)
